"""The examples of the documents run, their links lead somewhere, and the reference lists what there is."""

from __future__ import annotations

import doctest
import importlib
import math
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch.distributed.tensor import DTensor

import einlinear as el
from einlinear.structures import FAMILIES
from einlinear_lab.cli.app import app
from einlinear_lab.models import ResidualMLP
from tests.families import SAMPLES
from tests.lab.data.samples import needs

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/benchmarks/*.md")]


def read(document: str | Path) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", read(document), re.DOTALL | re.MULTILINE)


def listed(section: str) -> list[str]:
    """What stands in code in the first column of the tables of a section of the reference, or of all for ""."""
    text = read("docs/reference.md").partition(f"\n## {section}")[2]
    cells = re.findall(r"^\| (`.*?) \|", text.partition("\n## ")[0] if section else text, re.MULTILINE)
    return [name for cell in cells for name in re.findall("`(.*?)`", cell)]


def test_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every example, from top to bottom: later ones use the names of earlier ones."""
    monkeypatch.setattr("einlinear.structures.families.FAMILIES", dict(FAMILIES))
    torch.manual_seed(0)
    first, invent, compress, mix, schedule = blocks("README.md")
    names: dict[str, Any] = {}

    def run(code: str) -> None:
        exec(compile(code, "README.md", "exec"), names)

    run(first)
    assert isinstance(names["layer"], el.Linear)
    assert round(names["layer"].structure.macs / (1024 * 4096), 3) == 0.094

    run(invent)
    assert el.structure(names["mine"], 64, 64).macs == 1280
    assert [type(layer).__name__ for layer in names["model"]] == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    assert isinstance(names["model"][0], el.Linear)
    assert float(names["loss"].detach()) < math.log(10)  # of guessing

    run(compress)
    assert 0 < float(names["error"].detach()) < 1

    run(mix)
    assert names["loss"].requires_grad
    assert sum(el.moe_loads(names["moe"])[""].counts) == 2 * 32

    run(schedule)
    rates = [group["lr"] / group["lr_mult"] for group in names["optimizer"].param_groups]
    assert len({group["lr_mult"] for group in names["groups"]}) > 1
    assert rates == pytest.approx(len(rates) * rates[:1])  # the scheduler kept what structure-aware muP set


def test_patterns() -> None:
    """Every example, from top to bottom, gives what the page says."""
    examples = "\n".join(blocks("docs/patterns.md"))
    test = doctest.DocTestParser().get_doctest(examples, {}, "docs/patterns.md", None, None)
    result = doctest.DocTestRunner().run(test)
    assert result.failed == 0
    assert result.attempted > 15


def test_mixtures() -> None:
    names: dict[str, Any] = {}
    for example in blocks("docs/mixtures.md"):
        exec(compile(example, "docs/mixtures.md", "exec"), names)
    assert names["y"].shape == (4, 100, 1024)
    assert names["loss"].requires_grad


@needs("scipy")
def test_compression() -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    (example,) = blocks("docs/compression.md")
    exec(compile(example, "docs/compression.md", "exec"), names)
    assert names["report"].params <= 0.5 * names["report"].params_before
    assert names["distillation"].losses[-1] < names["distillation"].losses[0]


@needs("peft")
@needs("accelerate")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
def test_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for example in blocks("docs/huggingface.md"):
        exec(compile(example, "docs/huggingface.md", "exec"), names)
    assert names["loaded"].get_submodule("transformer.h.0.mlp.c_fc.base_layer").structure.spec == "btt(rank=2)"
    assert len(names["trainer"].optimizer.param_groups) > 2
    assert isinstance(
        names["tuned"].get_submodule("base_model.model.transformer.h.1.attn.c_attn.base_layer"), el.Linear
    )


def test_a_loop_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of the reference, in the one process that it is run by: it trains the sharded parameters."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    names: dict[str, Any] = {}
    (example,) = blocks("docs/reference.md")
    try:
        exec(compile(example, "docs/reference.md", "exec"), names)
    finally:
        torch.distributed.destroy_process_group()
    groups, parameters = names["groups"], list(names["model"].parameters())
    assert all(isinstance(p, DTensor) for p in parameters)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in parameters}
    plain = ResidualMLP(64, 128, 10, structure="btt(rank=2)")
    expected = el.param_groups(plain, lr=3e-3, base=names["base"], lr_scale=plain.LR_SCALE)
    assert [(g["param_names"], g["lr"]) for g in groups] == [(g["param_names"], g["lr"]) for g in expected]


def test_the_reference_has_every_public_name_and_no_other() -> None:
    packages = [name for _, name, is_package in pkgutil.walk_packages(el.__path__, "einlinear.") if is_package]
    modules = [importlib.import_module(name) for name in ("einlinear", *packages)]
    public = {f"{m.__name__}.{name}": getattr(m, name) for m in modules for name in getattr(m, "__all__", ())}
    found: dict[str, Any] = {}
    for name in (name for name in listed("") if name.startswith(("el.", "einlinear."))):
        module, _, attribute = re.sub(r"^el\.", "einlinear.", name).rpartition(".")
        thing = getattr(importlib.import_module(module), attribute)
        own = getattr(thing, "__module__", module) == module  # what is not a class or a function belongs to no module
        assert f"{module}.{attribute}" in public or own, f"{name} is not public"
        assert not any(thing is other for other in found.values()), f"{name} is there twice"
        found[name] = thing
    missing = [name for name, thing in public.items() if not any(thing is other for other in found.values())]
    assert not missing


def test_the_reference_has_every_command() -> None:
    assert {*listed("Commands")} == {*typer.main.get_command(app).commands}  # type: ignore[attr-defined]


def test_the_reference_has_every_environment_variable() -> None:
    known, asked = {*listed("Environment variables")}, {*read_variables()}
    assert asked <= known
    assert {name for name in known - asked if name.startswith("EINLINEAR")} == set()


def read_variables() -> Iterator[str]:
    """Those that the sources ask for, by their name or by that of a constant; of the scripts, the library's own."""
    for file in (ROOT / "src").rglob("*.py"):
        text = read(file)
        for key in re.findall(r'environ(?:\.get\(|\[)("?\w+)|("\w+)" in os\.environ', text):
            name = "".join(key)
            constant = re.search(rf'^{name} = "(\w+)"', text, re.MULTILINE)
            yield constant[1] if constant else name.removeprefix('"')
    for file in (ROOT / "Makefile", *(ROOT / "tools").glob("*.sh")):
        yield from re.findall(r"EINLINEAR_\w+", read(file))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", read(document)):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)", read(target), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], link


def test_contributing(tmp_path: Path) -> None:
    """Do what the guide says, in a copy: its two pieces of code are all that the conformance suite needs."""
    assert "grouped" not in FAMILIES
    assert "grouped" not in SAMPLES
    family, row = blocks("CONTRIBUTING.md")
    for folder in ("src", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for file in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / file, tmp_path)
    families = tmp_path / "src/einlinear/structures/families.py"
    families.write_text(f"{families.read_text()}\n\n{family}")
    samples = tmp_path / "tests/families.py"
    table = samples.read_text()
    assert table.count("\n}\n") == 1  # the end of SAMPLES
    samples.write_text(table.replace("\n}\n", f"\n{row}}}\n"))

    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "grouped or every_family"]
    done = subprocess.run(
        [*command, "tests/test_conformance.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) > 2 * 5  # of both specs of the row
