"""Passwords of databases: masked wherever an address is shown or kept."""

import json
import shlex
from pathlib import Path

import pytest
from tests.lab.made_up import run_of, write

from einlinear_lab.cli.running import command_line
from einlinear_lab.report import write_report
from einlinear_lab.runs.passwords import without_passwords
from einlinear_lab.runs.store import HISTORY, Store
from einlinear_lab.search.study import kind_of_storage

ADDRESSES = [
    "postgresql+psycopg://me:hunter2@host/name",
    "postgresql+psycopg://me:hunter2@host/name?sslmode=require",
    "postgresql+psycopg://host/name?user=me&password=hunter2",
    "postgresql+psycopg://me@host/name?sslmode=require&p%61ssword=hunter2",
    "postgresql+psycopg:///name?host=/run&password='hunter2'#",
    "mysql+pymysql://me:a/b@hunter2@host/name",
    "mysql+pymysql://me:a b hunter2@host/name",
    "mysql+pymysql://:hunter2@host",
    "mysql+pymysql://host/name?ssl_key=x&passwd=a b hunter2",
    "mssql+pyodbc:///?odbc_connect=DRIVER%3D%7BX%7D%3BUID%3Dme%3BPWD%3Dhunter2",
    "mssql+pyodbc://host/?odbc_connect=DRIVER={X};PWD={hunter2}",
    "postgresql:me:hunter2@host/name",
    "host=localhost user=me password=hunter2",
    "host=localhost password = 'x hunter2'",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_masked(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "hunter2" not in without_passwords(address)
    for arguments in (["--storage", address], [f"--storage={address}"]):
        monkeypatch.setattr("sys.argv", ["einlinear", "search", *arguments, "--out", "a@b"])
        assert "hunter2" not in command_line()
        assert command_line().endswith("--out a@b")
    with pytest.raises(ValueError, match=r"storage must be|does not answer") as caught:
        kind_of_storage(address)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "einlinear search --budget 100k data=digits --storage journal",
        "sqlite:///a/b.sqlite",
        "einlinear train data=text steps=10 out=me@host",
        "postgresql://me@host:5432/name",
    ],
)
def test_what_has_no_password_stays(text: str) -> None:
    assert without_passwords(text) == text


@pytest.mark.parametrize("address", ADDRESSES[:5])
def test_results_do_not_show_them_whoever_wrote_them_down(address: str, tmp_path: Path) -> None:
    record = write(tmp_path, run_of("dense"), 1, 0.5)
    command = shlex.join(["einlinear", "search", "--storage", address])
    (tmp_path / HISTORY).write_text(json.dumps({"command": command, "date": "x"}) + "\n")
    assert "hunter2" not in str(Store(tmp_path).commands())
    assert "hunter2" not in write_report([tmp_path]).path.read_text()
    Store(tmp_path).open([record.run], {"structure"}, f"{command} --trials 3", mix_code=True)
    assert "hunter2" not in (tmp_path / HISTORY).read_text()
