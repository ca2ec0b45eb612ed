"""Results that others made: what is damaged is named, left out, and stops nothing else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.lab.cli.command import run
from tests.lab.made_up import run_of, write

from einlinear_lab.report import write_report
from einlinear_lab.runs.records import read_record
from einlinear_lab.training import metrics

LINES = [{"step": i, "training_seconds": i / 10, "train_loss": 2 / i, "lr": 0.1} for i in (1, 50, 100)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for structure in ("dense", "btt"):
        for width in (16, 64):
            write(tmp_path, run_of(structure, width), width * 100, 1 / width, lines=LINES)
    return tmp_path


def victim(folder: Path) -> Path:
    return next((folder / "runs").glob("btt-w64-*"))


def change(path: Path, name: str, value: Any) -> None:
    content = json.loads(path.read_text())
    where = content
    *outer, last = name.split(".")
    for part in outer:
        where = where[part]
    where[last] = value
    path.write_text(json.dumps(content))


def check(folder: Path, message: str) -> None:
    """The page, and the commands, go on without it."""
    made = write_report([folder])
    (warning,) = [text for text in made.warnings if "left out" in text]
    assert message in warning
    for command in ("report", "fit"):
        code, out, err = run(command, folder)
        assert code == 0
        assert message in err
        assert "Traceback" not in out + err


WRONG = [
    ("result.json", "macs", "many"),
    ("result.json", "macs", None),
    ("result.json", "macs", 0),
    ("result.json", "compute", 10**30),
    ("result.json", "train_loss", "0.5"),
    ("result.json", "train_loss", [0.5]),
    ("result.json", "metrics", None),
    ("result.json", "metrics", {}),
    ("result.json", "metrics.train_error", "low"),
    ("result.json", "error", 0.5),
    ("result.json", "step_seconds", {}),
    ("result.json", "unheard", 1),
    ("run.json", "pattern", 7),
    ("run.json", "data_digest", None),
    ("run.json", "made_with", ["x"]),
    ("run.json", "config", None),
    ("run.json", "config.width", "wide"),
    ("run.json", "config.width", 10**400),
    ("run.json", "config.structure", {}),
]


@pytest.mark.parametrize(("file", "name", "value"), WRONG)
def test_a_value_of_a_wrong_type(file: str, name: str, value: Any, folder: Path) -> None:
    own = victim(folder)
    change(own / file, name, value)
    with pytest.raises(ValueError, match="cannot be read") as caught:
        read_record(own)
    assert str(caught.value).startswith(f"the run in {own} cannot be read: {file}: ")
    made = write_report([folder])
    assert f"{caught.value}; it is left out" in made.warnings


def test_commands_name_it(folder: Path) -> None:
    change(victim(folder) / "result.json", "macs", "many")
    check(folder, f"the run in {victim(folder)} cannot be read: result.json: macs should be a valid integer")


@pytest.mark.parametrize("content", ["null", "[]", '"x"', "[" * 100_000, '{"macs": NaN}', "{", "\xff"])
@pytest.mark.parametrize("file", ["run.json", "result.json"])
def test_a_file_of_something_else(content: str, file: str, folder: Path) -> None:
    (victim(folder) / file).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=f"cannot be read: {file}: "):
        read_record(victim(folder))


BAD_LINES = [
    "null",
    "[1]",
    '{"step": 60, "train',
    '{"step": "60", "training_seconds": 1}',
    '{"step": 60}',
    '{"step": 60, "training_seconds": 1, "train_loss": "low"}',
    '{"step": 60, "training_seconds": 1, "train_loss": NaN}',
    '{"step": 60, "training_seconds": 1, "train_loss": 1e999}',
    f'{{"step": {"9" * 400}, "training_seconds": 1}}',
    "[" * 100_000,
]


def insert(path: Path, line: str, place: int) -> None:
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:place], line, *lines[place:]]))


@pytest.mark.parametrize("line", BAD_LINES)
@pytest.mark.parametrize("place", [0, 2, 3])
def test_lines_of_metrics(line: str, place: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(own) + "\n" for own in LINES))
    insert(path, line, place)
    assert metrics.read(path) == LINES, "those after it count as well"
    (message,) = metrics.damaged(path)
    assert message.startswith(f"{path}, line {place + 1}: ")
    metrics.Metrics(path, 50)  # a run that goes on keeps what is good
    assert metrics.read(path) == LINES[:2]
    assert metrics.damaged(path) == []


@pytest.mark.parametrize("line", ["null", '{"step": 60, "train'])
def test_commands_name_lines(line: str, folder: Path) -> None:
    path = victim(folder) / "metrics.jsonl"
    insert(path, line, 1)
    check(folder, f"{path}, line 2: ")


@pytest.mark.parametrize("spoil", [lambda path: path.write_text("null"), lambda path: path.write_text('{"format": 1}')])
def test_a_coordinate_check(spoil: Callable[[Path], None], folder: Path) -> None:
    spoil(folder / "coord-check.json")
    made = write_report([folder])
    assert any("coord-check.json cannot be read" in text and "left out" in text for text in made.warnings)


@pytest.mark.parametrize("content", ["null", "{", '{"axes": 3}', '{"axes": ["width"], "budget": "all"}'])
def test_the_settings_of_a_search(content: str, folder: Path) -> None:
    (folder / "search.json").write_text(content)
    code, _, err = run("compare", "--structures", f"from-study:{folder}", "--out", folder / "out")
    assert code == 2
    assert "search.json cannot be read" in err
