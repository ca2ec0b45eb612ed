"""Where text comes from: names, files, Python's own source, rows of a data set."""

import gzip
import json
import sysconfig
from pathlib import Path

import pytest
from tests.lab.data.samples import needs, prose

from einlinear_lab.data import TextConfig, prepare_tokens
from einlinear_lab.data.text.sources import name_of, read_text


def test_a_folder_gives_its_text_files_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.txt", "A.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8-sig")  # with a byte order mark, as some editors write
    (part,) = read_text(str(tmp_path))
    assert list(part.documents()) == list(part.documents()) == ["A.txt", "a/c.txt", "b.txt"]
    assert part.size == sum((tmp_path / name).stat().st_size for name in ("b.txt", "a/c.txt", "A.txt"))


def test_any_suffix_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "README").write_text("read me")
    (part,) = read_text(str(tmp_path / "README"))
    assert list(part.documents()) == ["read me"]


def test_code_is_the_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (part,) = read_text("code")
    assert "the standard library of Python 3." in part.origin
    assert part.size is not None
    assert part.size > 5_000_000
    documents = part.documents()
    assert "import" in next(documents) + next(documents)

    for name in ("os.py", "site-packages/numpy.py", "dist-packages/torch.py", "json/x.py", "json/data.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "latin.py").write_bytes("# coding: latin-1\n# é\n".encode("latin-1"))
    (tmp_path / "wrong.py").write_bytes(b"# coding: nonsense\n")
    (tmp_path / "wrong2.py").write_bytes(b"# \xe9\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    (part,) = read_text("code")
    assert list(part.documents()) == ["# coding: latin-1\n# é\n", "# os.py\n", "", "", "# json/x.py\n"]

    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="this Python has no source of its standard library at"):
        read_text("code")


def test_sources_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for unknown in ("englisch", ""):
        with pytest.raises(ValueError, match=f"unknown text '{unknown}'; give one of english, code, openwebtext, hub:"):
            read_text(unknown)
    for path in ("a/b", "b.txt", "b.parquet"):
        with pytest.raises(FileNotFoundError, match=f"{path} does not exist; give one of"):
            read_text(path)
    with pytest.raises(ValueError, match=r"has no \.txt files, neither directly nor in subfolders"):
        read_text(".")
    for hub in ("hub:", "hub:a", "hub:a/b/c"):
        with pytest.raises(ValueError, match=rf"'{hub}' is no data set of the hub; write hub:OWNER/NAME"):
            read_text(hub)
    with pytest.raises(FileNotFoundError, match=r"the English text is not in .*english: run tools/fetch_english\.sh"):
        read_text("english")


def test_names_do_not_depend_on_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert name_of("a.txt") == str(tmp_path / "a.txt")
    assert [name_of(known) for known in ("code", "hub:a/b")] == ["code", "hub:a/b"]


ROWS = [{"text": f"{prose(30, f'row {i}')}\r\n{'é' if i % 2 else '漢字' * 20}\n", "other": i} for i in range(40)]


def write_rows(path: Path, rows: list[dict[str, object]]) -> str:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


@pytest.mark.parametrize("suffix", [pytest.param("parquet", marks=needs("pyarrow")), "jsonl", "jsonl.gz"])
def test_rows_of_a_local_file(suffix: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / f"rows.{suffix}", ROWS)
    (part,) = read_text(path)
    assert list(part.documents()) == list(part.documents()) == [row["text"] for row in ROWS]
    found = prepare_tokens(TextConfig(sources=(path,), tokens="char"), tmp_path / "out")
    assert (found.counts[0].documents, found.counts[0].documents_dropped) == (40, 20)
    text = found.tokenizer.decode(found.train)
    assert "row 1 0: " in text
    assert ".\n\ne\n\nrow 3 0: " in text
    assert "row 2 0: " not in text
    assert "\nrow" in found.tokenizer.decode(found.validation)


@needs("pyarrow")
def test_rows_that_cannot_be_read(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"title": "no text", "id": 1}])
    message = r"line 1 of .*rows\.jsonl has no column `text` with a text \(it has title, id\)"
    with pytest.raises(ValueError, match=message):
        prepare_tokens(TextConfig(sources=(path,)), tmp_path / "out")
    for name, message in (("rows.parquet", "is not a Parquet file"), ("rows.jsonl", "is not JSON")):
        (tmp_path / name).write_bytes(b"\x00 nothing of the kind")
        with pytest.raises(ValueError, match=rf"{name} {message}"):
            prepare_tokens(TextConfig(sources=(str(tmp_path / name),)), tmp_path / "out")


@needs("datasets")
def test_openwebtext_is_streamed_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def load_dataset(*name: object, **options: object) -> list[dict[str, object]]:
        asked.append((*name, *options.items()))
        return ROWS

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    found = prepare_tokens(TextConfig(sources=("openwebtext",), limit=20_000, validation=0.2), tmp_path / "out")
    assert asked == [("Skylion007/openwebtext", ("split", "train"), ("streaming", True))]
    assert found.counts[0].documents < len(ROWS)
    assert found.config["sources"] == ["openwebtext"]

    def unreachable(*_: object, **__: object) -> None:
        raise RuntimeError("no route to host")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(OSError, match=r"Skylion007/openwebtext cannot be read \(no route to host\); a local \.parquet"):
        prepare_tokens(TextConfig(sources=("openwebtext",)), tmp_path / "other")
