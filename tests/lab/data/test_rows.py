"""Files of text and of rows: what is read, and what is refused with which words."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from tests.lab.data.samples import needs

from einlinear_lab.data.rows import binary_kind, format_of, open_text, read_rows

ROWS: list[dict[str, Any]] = [{"text": 'a, "b"\nc 🙂', "id": "1"}, {"text": "naïve", "id": "2"}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows in the format that the name says."""
    kind = format_of(path)
    if kind == "parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    if kind == "jsonl":
        content = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n"
    elif kind == "json":
        content = json.dumps(rows)
    else:
        delimiter = "\t" if ".tsv" in path.name.lower() else ","
        quoted = [[f'"{value}"'.replace('"b"', '""b""') for value in row.values()] for row in rows]
        content = "\r\n".join(delimiter.join(row) for row in [[*rows[0]], *quoted])
    raw = b"\xef\xbb\xbf" + content.encode()  # with a byte order mark, as some editors write
    path.write_bytes(gzip.compress(raw) if path.suffix.lower() == ".gz" else raw)
    return path


NAMES = ("a.jsonl", "a.NDJSON", "a.json", "a.csv", "a.tsv", "a.jsonl.gz", "a.json.gz", "a.CSV.GZ")


@pytest.mark.parametrize("name", [*NAMES, pytest.param("a.parquet", marks=needs("pyarrow"))])
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, ROWS)
    found = list(read_rows(path))
    assert [row for _, row in found] == ROWS
    assert all(re.fullmatch(rf"(line|item|row) \d+ of {path}", where) for where, _ in found)


def test_json_of_other_forms(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"text": "one"}')
    assert list(read_rows(path)) == [(f"item 1 of {path}", {"text": "one"})]
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert list(read_rows(path))[1] == (f"line 2 of {path}", {"text": "two"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text"', r"line 2 of .*a\.jsonl is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n["x"]', r"line 3 of .*a\.jsonl is a list, not an object"),
        ("a.jsonl", b"[" * 100_000, r"line 1 of .*a\.jsonl is not JSON"),
        ("a.json", b'{"text": ', r"a\.json is not JSON"),
        ("a.json", b'["x", 3]', r"item 1 of .*a\.json is a text, not an object"),
        ("a.json", b"[null]", r"item 1 of .*a\.json is null"),
        ("a.csv", b"text,label\nx,1\ny,2,3\n", r"line 3 of .*a\.csv has more cells than the 2 columns"),
        ("a.csv", b'text\n"x', r"line 1 of .*a\.csv is not CSV"),
        ("a.jsonl", b'{"text": "\xe9"}', r"a\.jsonl is not UTF-8 text \(it has the byte 0xe9.*iconv"),
        ("a.csv.gz", b"text\nx\n", r"a\.csv\.gz is truncated or not compressed by gzip"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}' * 99, mtime=0)[:40],
            r"a\.jsonl\.gz is truncated or not compressed",
        ),
        ("a.jsonl", b"PK\x03\x04\x00\xff", r"a\.jsonl is not text but a ZIP archive, as \.docx"),
    ],
)
def test_rows_that_are_damaged(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_rows(tmp_path / name))


@needs("pyarrow")
def test_parquet_that_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"\x00 nothing of the kind")
    with pytest.raises(ValueError, match=r"a\.parquet is not a Parquet file"):
        list(read_rows(tmp_path / "a.parquet"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "README"])
def test_text(encoding: str, name: str, tmp_path: Path) -> None:
    raw = "naïve 🙂\r\ntwo\rthree\n".encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert binary_kind(tmp_path / name) is None
    with open_text(tmp_path / name) as file:
        assert file.read() == "naïve 🙂\ntwo\nthree\n"


def test_what_is_no_text(tmp_path: Path) -> None:
    contents = {"pdf": b"%PDF-1.7", "bin": b"ab\0c", "gz": b"\x1f\x8b\x08", "parquet": b"PAR1"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert [binary_kind(tmp_path / name) for name in contents] == [
        *("a PDF document", "a binary file (it holds NUL bytes)", "compressed by gzip; its name must end in .gz"),
        "a Parquet file; its name must end in .parquet",
    ]
    with pytest.raises(ValueError, match="is a folder; name a file"), open_text(tmp_path):
        pass
    with pytest.raises(FileNotFoundError), open_text(tmp_path / "none"):
        pass
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match=r"pipe\.txt is not a regular file"), open_text(tmp_path / "pipe.txt"):
        pass
