"""The English of Debian packages: fetched by the script (from a made-up apt here), read, checked."""

import gzip
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from einlinear_lab.data import TextConfig, prepare_tokens
from einlinear_lab.data.text.sources import page_text, read_text

SCRIPT = Path(__file__).parents[4] / "tools" / "fetch_english.sh"
PAGE = "<html><head><title>T</title></head><body><h1>Why {0}?</h1><p>Since\n  <b>it</b> is.</p></body></html>"

pytestmark = pytest.mark.skipif(
    not SCRIPT.exists() or not all(map(shutil.which, ("bash", "sha256sum", "gzip"))), reason="needs the script and bash"
)


def test_what_a_reader_sees_of_a_page() -> None:
    page = """<!DOCTYPE html><html><head><title>hidden</title><style>p { color: red }</style></head>
    <body><div><h1>A  heading</h1></div><p>First
    <i>line</i>, &quot;quoted&quot; &amp; &#233;.<br>Second</p><ul><li>one<li> two </ul>
    <script>hidden()</script><pre>a
      b</pre>end</body></html>"""
    seen = 'A heading\n\nFirst line, "quoted" & é.\nSecond\n\none\ntwo\n\na\n      b\n\nend'
    assert page_text(page) == seen
    assert page_text("") == ""
    assert page_text("</script>unbalanced</pre> tags") == "unbalanced\n\ntags"


class Debian:
    """A machine whose apt-get and dpkg hand out packages of this test's making."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.packages, self.bin, self.data = root / "packages", root / "bin", root / "data"
        for package in ("anarchism", "bible-kjv", "bible-kjv-text", "dict-foldoc"):
            self.file(package, f"usr/share/doc/{package}/copyright", b"free")
        self.file("anarchism", "usr/share/doc/anarchism/html/style.css", b"p {}")
        for i in range(150):
            self.file("anarchism", f"usr/share/doc/anarchism/html/part{i % 3}/{i}.html", PAGE.format(i).encode())
        self.file("bible-kjv", "usr/bin/bible", b'#!/bin/sh\ncat verses && exit "$(cat status)"\n', 0o755)
        verses = "".join(f"Gen{i}:1  And verse {i} was good.\n" for i in range(31102)).encode()
        self.file("bible-kjv-text", "usr/lib/verses", verses)
        self.file("bible-kjv-text", "usr/lib/status", b"0")
        entries = "".join(f"entry {i}\n\n   A word of computing, caf\xe9.\n" for i in range(500))
        self.file("dict-foldoc", "usr/share/dictd/foldoc.dict.dz", gzip.compress(entries.encode()))
        self.command(
            "apt-get",
            'echo "$*" >> "$PACKAGES/log"; for last; do :; done',
            'if [ -d "$PACKAGES/$last" ]; then touch "${last}_1.0_all.deb"; else echo "E: no $last" >&2; exit 100; fi',
        )
        self.command("dpkg", 'p=${2##*/}; mkdir -p "$3"; cp -r "$PACKAGES/${p%%_*}/." "$3"')
        monkeypatch.setenv("PATH", f"{self.bin}:{os.environ['PATH']}")
        monkeypatch.setenv("PACKAGES", str(self.packages))
        monkeypatch.setenv("EINLINEAR_DATA", str(self.data))

    def file(self, package: str, name: str, content: bytes, mode: int = 0o644) -> None:
        path = self.packages / package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(mode)

    def command(self, name: str, *lines: str) -> None:
        self.bin.mkdir(exist_ok=True)
        (self.bin / name).write_text("\n".join(["#!/bin/sh", *lines, ""]))
        (self.bin / name).chmod(0o755)

    def fetch(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", SCRIPT], capture_output=True, text=True, check=False)

    def downloads(self) -> int:
        return (self.packages / "log").read_text().count("download")


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Debian:
    return Debian(tmp_path, monkeypatch)


def test_fetched_once_and_prepared(debian: Debian, tmp_path: Path) -> None:
    done = debian.fetch()
    assert (done.returncode, done.stderr) == (0, "")
    assert "  bible-kjv-text, 0 KB" in done.stdout
    assert [path.name for path in debian.data.iterdir()] == ["english"]
    assert "is in" in debian.fetch().stdout
    assert debian.downloads() == 4

    english = debian.data / "english"
    assert sorted(path.name for path in (english / "copyright").iterdir()) == sorted(
        ("anarchism", "bible-kjv", "bible-kjv-text", "dict-foldoc")
    )
    essays, bible, dictionary = read_text("english")
    assert sorted(essays.documents())[0] == "Why 0?\n\nSince it is."
    assert len(list(essays.documents())) == 150
    assert next(bible.documents()).startswith("And verse 0 was good.\nAnd verse 1 was good.\n")
    assert next(dictionary.documents()).startswith("entry 0\n\n   A word of computing, café.\n")

    found = prepare_tokens(TextConfig(sources=("english",)), tmp_path / "out")
    assert [part.name for part in found.counts] == ["anarchism", "bible", "dictionary"]
    assert all(part.train_tokens and part.validation_tokens for part in found.counts), "each is split inside itself"
    assert found.counts[2].characters_replaced == 500


def test_a_damaged_text_is_refused_and_fetched_again(debian: Debian) -> None:
    debian.fetch()
    for name, what in (("kjv.txt", "damaged"), ("foldoc.dict.dz", "damaged"), ("anarchism/part0/0.html", "missing")):
        victim = debian.data / "english" / name
        if what == "missing":
            victim.unlink()
        else:
            victim.write_bytes(victim.read_bytes()[:-1])
        with pytest.raises(ValueError, match=rf"{victim.name} is {what}: delete .*english and run tools/fetch_english"):
            read_text("english")
        assert debian.fetch().returncode == 0
        read_text("english")
    assert debian.downloads() == 4 * 4


@pytest.mark.parametrize(
    ("package", "name", "content", "message"),
    [
        (
            "dict-foldoc",
            None,
            b"",
            "apt-get download dict-foldoc: E: no dict-foldoc (package lists missing? run apt-get",
        ),
        ("dict-foldoc", "usr/share/dictd/foldoc.dict.dz", b"\x1f\x8b", "the dictionary of dict-foldoc is damaged"),
        ("bible-kjv-text", "usr/lib/verses", b"Gen1:1 a\n", "bible-kjv printed 1 verses, not 31102"),
        ("bible-kjv-text", "usr/lib/status", b"7", "the program of bible-kjv does not run: "),
    ],
)
def test_what_can_fail(package: str, name: str | None, content: bytes, message: str, debian: Debian) -> None:
    if name is None:
        shutil.rmtree(debian.packages / package)
    else:
        debian.file(package, name, content)
    debian.command("apt-cache")  # knows every package: no need to update its lists
    done = debian.fetch()
    assert done.returncode == 1
    assert done.stderr.startswith(f"The English text could not be fetched: {message}")
    assert list(debian.data.iterdir()) == [], "nothing half done"


def test_a_machine_without_apt(debian: Debian, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("apt-get", "dpkg"):
        (debian.bin / name).unlink()
    for name in ("bash", "sha256sum"):
        (debian.bin / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(debian.bin))
    done = debian.fetch()
    assert done.returncode == 1
    assert "this needs apt-get and dpkg (Debian, Ubuntu). Elsewhere, give einlinear prepare a text" in done.stderr
