"""All commands: the version, help, families of the user's, and which packages have to be there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.lab.cli.command import QUICK, assert_refused, run

import einlinear as el
import einlinear_lab.cli.app
from einlinear.structures import FAMILIES
from einlinear_lab.cli import packages
from einlinear_lab.runs.options import from_text


def test_version_and_help() -> None:
    assert run("--version")[:2] == (0, f"einlinear {el.__version__}\n")
    assert all(command in run("--help")[1] for command in ("describe", "compare", "report", "coord-check"))
    options = re.sub(r"[\s│]+", " ", run("compare", "--help")[1])
    assert "Any other option of the runs, as for train" in options


def test_the_help_of_all_commands_is_their_own() -> None:
    """It is written apart from them, so that it can be shown without importing any."""
    for panel in einlinear_lab.cli.app.PANELS.values():
        for name, first_line in panel.items():
            command = einlinear_lab.cli.app.load(name)
            assert (command.name, command.get_short_help_str(1000)) == (name, first_line)


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], []])
def test_the_version_and_the_help_come_without_torch(arguments: list[str]) -> None:
    code = f"import sys, einlinear_lab.cli.app; sys.argv = {['einlinear', *arguments]}; einlinear_lab.cli.app.main()"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=False)
    assert "einlinear" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "numpy", "einlinear"}


def test_a_command_imports_no_other() -> None:
    code = "import sys, einlinear_lab.cli.app; einlinear_lab.cli.app.load('describe'); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "einlinear_lab.cli.describe" in modules
    assert not {"einlinear_lab.cli.compare", "einlinear_lab.cli.search", "torch._dynamo"} & {*modules}


GROUPED = """
from einlinear import register_family

register_family("grouped", lambda rank=2: f"(g a), g r a, g e r -> (g e) where g=4, r={rank}")
"""


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("einlinear.structures.families.FAMILIES", dict(FAMILIES))


@pytest.mark.usefixtures("own_registry")
def test_a_family_of_the_users_from_a_file_or_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(run("describe", "grouped(rank=3)", 64, 64), "unknown family 'grouped'")
    file = tmp_path / "random.py"  # called as a module of Python
    file.write_text(GROUPED)
    code, out, _ = run("--import", file, "describe", "grouped(rank=3)", 64, 64)
    assert code == 0
    assert out.startswith("grouped(rank=3), 64 -> 64")
    assert sys.modules["random"].__file__ != str(file)

    (tmp_path / "my_families").mkdir()
    (tmp_path / "my_families" / "halves.py").write_text(GROUPED.replace("grouped", "halves"))
    monkeypatch.syspath_prepend(tmp_path)
    options = ("--structures", "halves", "--widths", 16, *QUICK, "--out", tmp_path / "out")
    code, out, _ = run("--import", "my_families.halves", "compare", *options)
    assert code == 0
    assert "halves" in out


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize(
    ("target", "code", "parts"),
    [
        ("absent.py", None, ["--import absent.py: there is no such file"]),
        ("absent.families", None, ["--import absent.families: there is no such module", "its path, which ends in .py"]),
        ("here.py", "import absent\n", ["No module named 'absent'", 'here.py", line 1']),
        ("here.py", "x = 1\nx +\n", ["invalid syntax", 'here.py", line 2']),
        ("here.py", GROUPED.replace("grouped", "btt"), ["'btt' is already registered", 'here.py", line 4']),
    ],
)
def test_an_import_that_fails_says_why(
    target: str, code: str | None, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if code:
        Path(target).write_text(code)
    exit_code, out, err = run("--import", target, "describe", "btt", 64, 64)
    assert (exit_code, out) == (2, "")
    assert err.startswith(f"error: --import {target}: ")
    assert all(part in err for part in parts)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda module: None if module in ("PIL", "joblib") else module)
    for command in (("compare",), ("coord-check",), ("report", tmp_path)):
        code, out, err = run(*command)
        assert code == 1
        assert "(joblib, PIL)" in out + err
        assert "pip install 'einlinear[lab]'" in out + err


def test_the_packages_that_are_asked_for_are_those_of_the_extra() -> None:
    project = from_text((Path(__file__).parents[3] / "pyproject.toml").read_text(), "pyproject.toml")["project"]
    wanted = {re.split(r"[>=\[]", package)[0] for package in project["optional-dependencies"]["lab"]}
    modules = {"pillow": "PIL", "scikit-learn": "sklearn"}
    wanted = {modules.get(name, name) for name in wanted - {"matplotlib"}}  # which only bench.png needs
    assert set(packages.LAB) | {"tomli"} == wanted
    assert ("tomli" in packages.LAB) == (sys.version_info < (3, 11))


def without(modules: tuple[str, ...], *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a Python where these modules cannot be imported."""
    code = f"import sys; sys.modules.update(dict.fromkeys({modules})); from einlinear_lab.cli.app import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_describe_needs_neither_data_nor_plots(tmp_path: Path) -> None:
    (tmp_path / "families.py").write_text(GROUPED)
    used = (*packages.CLI, "numpy", "pydantic")  # the last two by torch and, perhaps, typer
    heavy = tuple(module for module in packages.LAB if module not in used)
    done = without(heavy, "--import", tmp_path / "families.py", "describe", "grouped", 64, 64)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("grouped, 64 -> 64")


def test_the_entry_point_needs_no_extra_package_to_say_so() -> None:
    done = without(packages.CLI)
    assert done.returncode == 1
    assert "(rich, typer)" in done.stderr
    assert "pip install 'einlinear[lab]'" in done.stderr
    assert "Traceback" not in done.stderr
