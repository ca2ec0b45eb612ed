"""The command line, from the arguments to the exit code."""

import errno
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import einlinear as el
from einlinear.cli import display, packages
from einlinear.cli.app import app
from einlinear.cli.parsing import assignments, numbers, specs
from einlinear.experiments.findings import coordinates
from einlinear.experiments.runs.execute import execute
from einlinear.experiments.runs.options import from_text
from einlinear.experiments.runs.records import alone, read_record
from einlinear.experiments.runs.run import Run
from einlinear.experiments.runs.store import Store
from einlinear.experiments.sweeps import workers
from einlinear.experiments.sweeps.sweep import Event
from einlinear.structures import FAMILIES
from einlinear.structures.mup import adam_multipliers, init_std

QUICK = ("--data", "digits", "--epochs", "1", "--batch-size", "256", "depth=1", "--seeds", "1")
TINY = ("--structures", "dense; btt", "--macs", "10k,20k", "--dense-reach", "1", *QUICK)


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def assert_refused(answer: tuple[int, str, str], *parts: str) -> None:
    """One message and no traceback."""
    code, out, err = answer
    assert code == 2
    assert err.startswith("error: ")
    assert "Traceback" not in out + err
    for part in parts:
        assert part in err


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that were trained, in order, in this process."""
    runs: list[Run] = []

    def here(tasks: Sequence[tuple[Run, Path]]) -> Iterator[Event]:
        for run, folder in tasks:
            runs.append(run)
            yield Event(run, "running", 1, 5, 2.0)
            execute(run, folder)
            yield Event(run, "finished")

    monkeypatch.setattr(workers, "Workers", lambda *_: here)
    return runs


def test_compare_from_images_to_report_and_again(tmp_path: Path, trained: list[Run]) -> None:
    code, out, err = run("compare", *TINY, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    found = Store(tmp_path / "out").records()
    assert len(found) == len(trained) == 4
    for record in found:
        assert record.result is not None
        model = record.run.model
        lines = [
            line for line in out.splitlines() if line.startswith(f"{model.structure} ") and f" {model.width} " in line
        ]
        assert any(f"{record.result.macs:,}" in line and f"{record.result.train_loss:.4f}" in line for line in lines)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "scikit-learn&#39;s digits" in page

    (tmp_path / "out" / "report.html").unlink()
    code, again, _ = run("compare", *TINY, "--out", tmp_path / "out")
    assert (code, len(trained)) == (0, 4)
    assert "0 runs to do" in again
    assert "4 of 4 are already there" in again
    assert (tmp_path / "out" / "report.html").exists()

    code, table, _ = run("report", tmp_path / "out")
    assert code == 0
    assert all(f"{record.result.train_loss:.4f}" in table for record in found if record.result)


@pytest.mark.usefixtures("trained")
def test_options_of_the_comparison_may_be_written_as_those_of_runs(tmp_path: Path) -> None:
    words = ("data=digits", "seeds=2", "epochs=1", "structures=dense;btt", "widths=16,32", "warmup=3", "betas=0.9,0.99")
    code, _, err = run("compare", *words, "batch_size=256", "depth=1", "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    runs = [record.run for record in Store(tmp_path / "out").records()]
    assert {(run.model.structure, run.model.width, run.seed) for run in runs} == {
        (structure, width, seed) for structure in ("dense", "btt") for width in (16, 32) for seed in (0, 1)
    }
    assert {run.training.betas for run in runs} == {(0.9, 0.99)}
    assert {run.training.warmup for run in runs} == {3}


def test_workers_are_processes(tmp_path: Path) -> None:
    code, out, err = run("compare", *TINY, "--widths", 16, "--macs", "20k", "--out", tmp_path / "no")
    assert_refused((code, out, err), "not both")
    options = (*QUICK, "--structures", "dense;btt", "--widths", 16, "--workers", 2, "--out", tmp_path / "out")
    assert run("compare", *options)[0] == 0
    assert len(Store(tmp_path / "out").records()) == 2


def test_an_interrupt_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def impatient(tasks: Sequence[tuple[Run, Path]]) -> Iterator[Event]:
        run, folder = tasks[0]
        execute(run, folder)
        yield Event(run, "finished")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(workers, "Workers", lambda *_: impatient)
        code, _, err = run("compare", *TINY, "--out", tmp_path / "out")
    assert code == 130
    assert "keeps what was done; the same command goes on from there" in err
    assert "Traceback" not in err
    assert len(Store(tmp_path / "out").records()) == 1
    code, out, _ = run("compare", *TINY, "--out", tmp_path / "out")
    assert code == 0
    assert "3 runs to do" in out
    assert "1 of 4 are already there" in out


def test_a_failed_run_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(tasks: Sequence[tuple[Run, Path]]) -> Iterator[Event]:
        for i, (run, folder) in enumerate(tasks):
            if i:
                execute(run, folder)
            yield Event(run, "finished") if i else Event(run, "failed", message="no more memory")

    monkeypatch.setattr(workers, "Workers", lambda *_: failing)
    code, _, err = run("compare", *TINY, "--out", tmp_path / "out")
    assert code == 1
    assert "failed: no more memory" in err
    assert len(Store(tmp_path / "out").records()) == 3


@pytest.mark.usefixtures("trained")
def test_a_diverged_run_is_shown_and_others_go_on(tmp_path: Path) -> None:
    code, out, _ = run("compare", *TINY, "--lr", 1e30, "--out", tmp_path / "out")
    assert code == 0
    assert sum("diverged" in line for line in out.splitlines() if line.startswith(("dense", "btt"))) == 4


def test_a_truncated_run_is_reported(tmp_path: Path, trained: list[Run]) -> None:
    run("compare", *TINY, "--out", tmp_path / "out")
    victim = Store(tmp_path / "out").path(trained[1])
    (victim / "result.json").write_text("{")
    code, _, err = run("compare", *TINY, "--out", tmp_path / "out")
    assert (code, len(trained)) == (0, 5)
    assert f"the run in {victim} cannot be read" in err


def test_a_folder_of_other_settings_is_refused(tmp_path: Path, trained: list[Run]) -> None:
    run("compare", *TINY, "--out", tmp_path / "out")
    answer = run("compare", *TINY, "--lr", 0.01, "--out", tmp_path / "out")
    assert_refused(answer, "lr was 0.003, now 0.01", "Name another folder")
    assert len(trained) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--structures", "dense;bttt"), "Did you mean 'btt'"),
        (("--structures", "(g a), g r f a, f e g r -> (f e"), "expected ')'"),
        (("--macs", "50k,many"), "--macs: 'many' is no number"),
        (("--macs", "50k", "--widths", "64"), "not both"),
        (("--macs", "1k"), "the cheapest model takes"),
        (("--widths", ","), "--widths is empty"),
        (("--widths", "64.5"), "--widths: '64.5' is not a whole number"),
        (("--preset", "paper-ish"), "the presets are demo, paper"),
        (("macs=50k,many",), "--macs: 'many' is no number"),
        (("preset=paper-ish",), "the presets are demo, paper"),
        (("seeds=two",), "seeds should be a valid integer"),
        (("--epochs", "2", "steps=9"), "not both"),
        (("--batch-size", "5000"), "batch_size=5000"),
        (("--batchsize", "50"), "no option 'batchsize': did you mean 'batch_size'"),
        (("wide",), "'wide' sets no option; write NAME=VALUE"),
        (("lr=",), "'lr=' has no value"),
        (("width=64",), "width cannot be set: a comparison varies"),
        (("--data", "digts"), "did you mean 'digits'"),
        (("--data", "no/such/folder"), "does not exist"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(
    arguments: tuple[str, ...], message: str, tmp_path: Path, trained: list[Run]
) -> None:
    assert_refused(run("compare", *QUICK, "--out", tmp_path / "out", *arguments), message)
    assert trained == []
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    answer = run("compare", *QUICK, "--data", tmp_path / "images", "--out", tmp_path / "out")
    assert_refused(answer, "neither subfolders nor images")


def test_an_image_with_nan_pixels(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(3):
            pixels = np.full((8, 8), np.nan if (label, i) == ("dog", 1) else 0.5 + i, dtype=np.float32)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{i}.tif")
    answer = run("compare", *QUICK, "--data", tmp_path / "images", "--out", tmp_path / "out")
    assert_refused(answer, "NaN", "1.tif")


@pytest.mark.usefixtures("trained")
def test_a_folder_of_images(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(10):
            pixels = random.integers(0, 256, (6, 7, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{i}.png")
    options = (*TINY, "--data", tmp_path / "images", "--batch-size", 4, "--image-size", 6, "limit=8")
    code, out, _ = run("compare", *options, "--out", tmp_path / "out")
    assert code == 0
    assert "4 runs to do" in out


def test_describe_against_numbers_worked_out_here() -> None:
    code, out, _ = run("describe", "btt(rank=2)", 1024, 4096)
    assert code == 0
    blocks_in = inner_in = 32  # 1024 = 32 · 32
    blocks_out = inner_out = 64  # 4096 = 64 · 64
    a = blocks_in * 2 * blocks_out * inner_in
    b = blocks_out * inner_out * blocks_in * 2
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    std_a, std_b = inner_in**0.5 / inner_in, inner_out**0.5 / (2 * blocks_in)
    row_a = ["32×2×64×32", "32", "128", f"{a:,}", f"{a:,}", f"{std_a:.4g}", f"{1024 / 32 / 2:g}×"]
    row_b = ["64×64×32×2", "64", "64", f"{b:,}", f"{b:,}", f"{std_b:.4g}", f"{1024 / 64 / 2:g}×"]
    assert lines["A"] == ["A", "g", "r", "f", "a", *row_a]
    assert lines["B"] == ["B", "f", "e", "g", "r", *row_b]
    assert lines["params"] == ["params", f"{a + b:,}", f"{1024 * 4096:,}", "0.09375"]
    assert lines["MACs"][1:] == lines["params"][1:]
    assert lines["rank"] == ["rank", "1,024", "1,024", "1"]
    assert [lines[name][-2:] for name in ("psi", "nu", "omega")] == [["1", "1"], ["0.5", "1"], ["0", "0"]]
    assert "(g a), g r f a, f e g r -> (f e)" in out


@pytest.mark.parametrize("spec", ["dyad(variant=dt)", "tt(rank=3, cores=3)", "blast(blocks=4, rank=2)"])
def test_describe_shows_every_factor(spec: str) -> None:
    s = el.structure(spec, 64, 128)
    _, out, _ = run("describe", spec, 64, 128)
    for factor, std, multiplier in zip(s.factors, init_std(s), adam_multipliers(s), strict=True):
        words = next(line.split() for line in out.splitlines() if line.startswith(f"{factor.name} "))
        assert words[-2:] == [f"{std:.4g}", f"{multiplier:.4g}×"]
        assert "×".join(map(str, factor.shape)) in words


def test_describe_the_plan() -> None:
    _, out, _ = run("describe", "btt", 64, 64, "--plan", "--tokens", 1)
    assert "Executor for 1 inputs" in out
    assert "a dense layer would be faster" in out
    assert "A  batch (g), rows (r f), inner (a), columns (tokens): (tokens g a) -> (g r f tokens)" in out
    assert "Executor" not in run("describe", "btt", 64, 64)[1]


def test_describe_with_a_budget() -> None:
    _, out, _ = run("describe", "btt", 1024, 4096, "--max-macs", 0.25)
    assert out.startswith("btt(rank=5), 1024 -> 4096")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("monrch", 64, 64), "Did you mean 'monarch'"),
        (("btt", 0, 64), "at least 1"),
        (("dense", 64, 64, "--max-macs", 0.5), "too small"),
    ],
)
def test_describe_refuses(arguments: tuple[object, ...], message: str) -> None:
    assert_refused(run("describe", *arguments), message)


def test_report_of_a_folder_without_results(tmp_path: Path) -> None:
    assert_refused(run("report", tmp_path), "holds no results of einlinear")


CHECK = ("coord-check", "--data", "digits", "--widths", "16,64", "--depth", 1, "--batch-size", 64)


def test_coordinate_check(tmp_path: Path) -> None:
    code, out, _ = run(*CHECK, "--steps", 3, "--out", tmp_path / "new" / "check")
    assert code == 0
    rows = [line.split() for line in out.splitlines() if line.startswith(("dense", "btt"))]
    assert [row[0] for row in rows] == ["dense", "btt", "btt"]
    for row in rows:
        small, large = sorted(float(value) for value in row[-3:-1])
        assert 0 < small < large < 10
        assert float(row[-1]) == pytest.approx(large / small, rel=0.01)
    assert rows[1][-3:] != rows[2][-3:]  # its own learning rates, those of dense
    page = (tmp_path / "new" / "check" / "report.html").read_text()
    assert "btt, naive" in page
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=", page)


def test_a_coordinate_check_of_a_structure_that_does_not_fit_the_base_width(tmp_path: Path) -> None:
    arguments = ("--structures", "monarch(blocks=8)", "--widths", "64", "--base-width", 16, "--steps", 2)
    code, out, _ = run(*CHECK, *arguments, "--out", tmp_path / "check")
    assert code == 0
    assert "monarch(blocks=8)" in out


@pytest.mark.parametrize("structures", ["dense", "dense; btt"])
def test_a_diverged_coordinate_check_is_shown(structures: str, tmp_path: Path) -> None:
    arguments = ("--steps", 3, "--lr", 1e30, "--structures", structures, "--out", tmp_path / "check")
    code, out, _ = run(*CHECK, *arguments)
    assert code == 0
    rows = [line.split() for line in out.splitlines() if line.startswith(("dense", "btt"))]
    assert [row[-3:] for row in rows] == len(rows) * [["diverged", "diverged", "–"]]
    assert len(rows) == (1 if structures == "dense" else 3)
    assert (tmp_path / "check" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--structures", "btt;bt"), "unknown family 'bt'"),
        (("--steps", "1"), "steps must be at least 2, not 1: the first moves only the head"),
        (("--widths", "16,64.5"), "--widths: '64.5' is not a whole number"),
        (("heads=2",), "has no option 'heads'"),
    ],
)
def test_a_coordinate_check_refuses_before_it_trains(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(coordinates, "coord_check", None)
    assert_refused(run(*CHECK, *arguments), message)
    assert list(tmp_path.iterdir()) == []


def test_version_and_help() -> None:
    assert run("--version")[:2] == (0, f"einlinear {el.__version__}\n")
    assert all(command in run("--help")[1] for command in ("describe", "compare", "report", "coord-check"))
    options = re.sub(r"[\s│]+", " ", run("compare", "--help")[1])
    assert "Any other option of the runs, as for train" in options


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (["dense; btt", "monarch"], ("dense", "btt", "monarch")),
        (["dense,btt"], ("dense", "btt")),
        (
            ["tt(rank=2, cores=3), einsum(rank=1, theta=(1/2, 1/2, 0, 1/2, 1/2, 0, 0)),btt;"],
            ("tt(rank=2, cores=3)", "einsum(rank=1, theta=(1/2, 1/2, 0, 1/2, 1/2, 0, 0))", "btt"),
        ),
        (
            ["i, r i, o r -> o where r=2; dense, (g a), g o a -> (g o)"],
            ("i, r i, o r -> o where r=2", "dense, (g a), g o a -> (g o)"),
        ),
        (["i, r i, o r"], ("i, r i, o r",)),  # a pattern without its arrow: the message should show all of it
        (["btt(rank=2"], ("btt(rank=2",)),
        (None, None),
    ],
)
def test_lists_of_structures(written: list[str] | None, read: tuple[str, ...] | None) -> None:
    assert specs(written) == read


def test_options_of_runs() -> None:
    assert assignments(["lr=1e-3", "--batch-size", "64", "--depth=2", "structure=btt(rank=2)"]) == {
        "lr": "1e-3",
        "batch_size": "64",
        "depth": "2",
        "structure": "btt(rank=2)",
    }
    assert assignments(None) == {}
    assert assignments(["lr=1", "--lr", "2"]) == {"lr": "2"}


def test_lists_of_numbers() -> None:
    assert numbers("64, 50k,2.3M,1e3,", "--macs") == (64, 50_000, 2_300_000, 1000)
    assert numbers(None, "--macs") is None
    for wrong in ("1/0", "nan", "inf", "k", "0.0005k"):
        with pytest.raises(ValueError, match=f"--macs: '{wrong}' is no"):
            numbers(wrong, "--macs")


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
    monkeypatch.setattr(packages, "find_spec", lambda module: None if module in ("PIL", "kornia") else module)
    for command in (("compare",), ("coord-check",), ("report", tmp_path)):
        code, out, err = run(*command)
        assert code == 1
        assert "(kornia, PIL)" in out + err
        assert "pip install 'einlinear[experiments]'" in out + err


def test_the_packages_that_are_asked_for_are_those_of_the_extra() -> None:
    project = from_text((Path(__file__).parents[2] / "pyproject.toml").read_text(), "pyproject.toml")["project"]
    wanted = {re.split(r"[>=\[]", package)[0] for package in project["optional-dependencies"]["experiments"]}
    modules = {"pillow": "PIL", "scikit-learn": "sklearn"}
    wanted = {modules.get(name, name) for name in wanted - {"einlinear", "matplotlib"}}  # which only bench.png needs
    assert set(packages.EXPERIMENTS) | {"tomli"} == wanted
    assert ("tomli" in packages.EXPERIMENTS) == (sys.version_info < (3, 11))


def without(modules: tuple[str, ...], *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a Python where these modules cannot be imported."""
    code = f"import sys; sys.modules.update(dict.fromkeys({modules})); import einlinear.cli; einlinear.cli.main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_describe_needs_neither_data_nor_plots(tmp_path: Path) -> None:
    (tmp_path / "families.py").write_text(GROUPED)
    used = ("numpy", "pydantic")  # by torch and, perhaps, typer
    heavy = tuple(module for module in packages.EXPERIMENTS if module not in used)
    done = without(heavy, "--import", tmp_path / "families.py", "describe", "grouped", 64, 64)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("grouped, 64 -> 64")


def test_the_entry_point_needs_no_extra_package_to_say_so() -> None:
    done = without(packages.CLI)
    assert done.returncode == 1
    assert "(rich, typer)" in done.stderr
    assert "pip install 'einlinear[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


# Single runs, sweeps, recipes


def test_train_and_go_on(tmp_path: Path) -> None:
    options = ("data=digits", "structure=btt", "steps=20", "depth=1", "threads=1", "--out", tmp_path / "run")
    code, out, _ = run("train", *options)
    assert code == 0
    record = read_record(tmp_path / "run")
    assert record.result is not None
    assert f"{record.result.train_loss:.4f}" in out
    assert "test accuracy" in out
    assert (tmp_path / "run" / "checkpoints").exists()
    assert run("train", *options)[0] == 0
    assert_refused(run("train", *options, "lr=1e-2"), "lr was 0.003, now 0.01")
    assert_refused(run("train", "data=digits", "--out", tmp_path / "other"), "steps must be given")


TRAIN = ("train", "data=digits", "steps=4", "depth=1", "width=16", "threads=1")


@pytest.mark.parametrize("bug", [ValueError, TypeError])
def test_a_bug_in_training_is_no_mistake_of_the_users(
    bug: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise bug("shapes")

    monkeypatch.setattr("einlinear.experiments.runs.execute.training.train", fail)
    with pytest.raises(bug, match="shapes"):
        run(*TRAIN, "--out", tmp_path / "run")
    monkeypatch.setattr(workers, "Workers", lambda *_: fail)
    with pytest.raises(bug, match="shapes"):
        run("compare", *TINY, "--out", tmp_path / "out")


def test_a_full_disk_and_a_folder_in_use_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    (tmp_path / "run").mkdir()
    with alone(tmp_path / "run" / ".lock", ""):
        assert_refused(run(*TRAIN, "--out", tmp_path / "run"), "another process is at work")
    monkeypatch.setattr("einlinear.experiments.runs.execute.training.train", full)
    assert_refused(run(*TRAIN, "--out", tmp_path / "new"), "No space left on device: 'metrics.jsonl'")


def test_another_run_is_refused_before_it_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*TRAIN, "--out", tmp_path / "run")[0] == 0
    monkeypatch.setattr("einlinear.experiments.runs.execute.training.train", None)
    assert_refused(run(*TRAIN, "width=32", "--out", tmp_path / "run"), "width was 16, now 32", "Name another folder")
    monkeypatch.setattr("einlinear.experiments.runs.records.code_version", lambda: "9.9+beef")
    assert_refused(run(*TRAIN, "--out", tmp_path / "run"), "now '9.9+beef'")


def test_a_damaged_run_is_done_again(tmp_path: Path) -> None:
    assert run(*TRAIN, "--out", tmp_path / "run")[0] == 0
    (tmp_path / "run" / "result.json").write_text("{")
    assert run(*TRAIN, "--out", tmp_path / "run")[0] == 0
    assert read_record(tmp_path / "run").result


def test_under_torchrun_the_first_process_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, bars in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        with monkeypatch.context() as patched:
            patched.setattr("rich.console.Console.is_terminal", True)
            assert display.progress().disable is not bars
        code, out, err = run("train", "data=digits", "stps=4", "--out", tmp_path / "run")
        assert (code, out) == (2, "")
        assert ("no option 'stps'" in err) == bars
        answer = run("compare", *TINY, "--out", tmp_path / "out")
        assert answer[0] == 2
        assert ("start this without it" in answer[2]) == bars
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("trained")
def test_a_sweep_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "sizes.toml"
    path.write_text('[settings]\ndata = "digits"\nsteps = 9\ndepth = 1\n[grid]\nstructure = ["dense", "btt"]\n')
    code, out, _ = run("sweep", path, "width=16", "--out", tmp_path / "out")
    assert code == 0
    assert "2 runs to do" in out
    assert {record.run.model.width for record in Store(tmp_path / "out").records()} == {16}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lr-tranfer",), "lr-transfer"),
        (("lr-transfer", "device=cuda"), "this torch finds no CUDA device"),
        (("lr-transfer", "--scale", "huge"), "huge"),
        (("feature-updates",), "einlinear coord-check"),
        (("lr-transfer", "--gpus", "0"), "--gpus goes with --on ray"),
        (("lr-transfer", "--cpus", "1"), "--cpus goes with --on ray"),
        (("lr-transfer", "--address", "auto"), "--address goes with --on ray"),
        (("lr-transfer", "--on", "ray", "--workers", "2"), "--workers goes with --on local"),
        (("absent.toml", "--scale", "small"), "--scale is that of a recipe, and absent.toml is a file"),
        (("lr-transfer", "--on", "slurm"), "--on must be local or ray, not 'slurm'"),
        (("absent.toml",), "absent.toml does not exist; give a .toml or .json file, or the name of a recipe"),
        (("image-mlp", "--scale", "paper"), "data/cifar-10"),
    ],
)
def test_a_sweep_that_cannot_be(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    assert_refused(run("sweep", *arguments, "--out", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


def test_recipes_are_listed() -> None:
    code, out, _ = run("recipes")
    assert code == 0
    assert "einlinear sweep lr-transfer" in out
    assert "einlinear coord-check" in out


def test_a_text_that_is_not_there_says_how_to_prepare_it(tmp_path: Path) -> None:
    answer = run("train", "model=gpt", "data=data/absent", "steps=5", "--out", tmp_path / "out")
    assert_refused(answer, "data/absent", "einlinear prepare")
