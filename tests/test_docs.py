"""The documentation: its examples run, its commands parse, its links lead somewhere, and the reference is complete."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.tensor import DTensor
from typer.testing import CliRunner

import einlinear as el
import einlinear_lab
from einlinear.nn import GatedExperts
from einlinear.structures import FAMILIES
from einlinear_lab.cli.app import PANELS, app, load
from einlinear_lab.models import ResidualMLP
from einlinear_lab.sweeps.sweep import read_sweep
from tests.families import SAMPLES
from tests.lab.data.samples import needs

ROOT = Path(__file__).parent.parent
ROOT_PAGES = sorted(ROOT.glob("*.md"))
PAGES = [page for page in sorted(ROOT.glob("docs/**/*.md")) if "benchmarks" not in page.parts]
NAMES = {page.relative_to(ROOT).as_posix(): page for page in (ROOT / "README.md", *PAGES)}


def read(document: str | Path) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str | Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", read(document), re.DOTALL | re.MULTILINE)


def tool(name: str) -> ModuleType:
    """A script in tools, imported."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def started(names: dict[str, Any]) -> None:
    assert names["layer"].structure.params == names["layer"].structure.macs == 393_216
    assert str(names["report"]) in read("docs/get-started.md")


def landing(names: dict[str, Any]) -> None:
    dense = 2 * 1024 * 4096
    assert [type(layer) for layer in names["model"]] == [el.Linear, torch.nn.GELU, el.Linear]
    assert round(sum(p.numel() for p in names["model"].parameters()) / dense, 2) == 0.09
    assert len({group["lr"] for group in names["optimizer"].param_groups}) > 1


def trained(names: dict[str, Any]) -> None:
    rates = [group["lr"] / group["lr_mult"] for group in names["optimizer"].param_groups]
    assert min(names["rates"]) > 0
    assert rates == pytest.approx(len(rates) * rates[:1])  # the scheduler kept the ratios of structure-aware muP
    assert names["y"].shape == (512, 256)


def transferred(names: dict[str, Any]) -> None:
    assert names["result"].width == 256
    assert 0 < names["result"].relative_update < 0.3


def mixed(names: dict[str, Any]) -> None:
    assert names["y"].shape == (4, 100, 1024)
    assert names["loss"].requires_grad
    assert isinstance(names["mixtral"].model.layers[1].mlp.experts, GatedExperts)


def compressed(names: dict[str, Any]) -> None:
    assert names["report"].params <= 0.5 * names["report"].params_before


def distilled(names: dict[str, Any]) -> None:
    assert names["distillation"].losses[-1] < names["distillation"].losses[0]


def quantised(names: dict[str, Any]) -> None:
    for name in ("quantised", "structured"):
        assert any(isinstance(layer, el.nn.QuantizedLinear) for layer in names[name].modules())


def narrowed(names: dict[str, Any]) -> None:
    assert names["model"].up.out_features == names["model"].down.in_features == 512


def hugging_face(names: dict[str, Any]) -> None:
    assert names["loaded"].get_submodule("transformer.h.0.mlp.c_fc.base_layer").structure.spec == "btt(rank=2)"
    assert len(names["trainer"].optimizer.param_groups) > 2
    attention = names["tuned"].get_submodule("base_model.model.transformer.h.1.attn.c_attn.base_layer")
    assert isinstance(attention, el.Linear)


def adapted(names: dict[str, Any]) -> None:
    """The printed report is that of the page, and the method of peft merges into plain layers."""
    assert str(names["report"]) in read("docs/guides/adapters.md")
    assert type(names["compressed"][0]) is torch.nn.Linear
    assert names["fresh"][0].active == ("default",)
    assert type(names["merged"]) is type(names["gpt2"])


def distributed(names: dict[str, Any]) -> None:
    """The groups hold the sharded parameters, with the learning rates of a model that is not sharded."""
    groups, parameters = names["groups"], list(names["model"].parameters())
    assert all(isinstance(p, DTensor) for p in parameters)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in parameters}
    plain = ResidualMLP(64, 128, 10, structure="btt(rank=2)")
    expected = el.param_groups(plain, lr=3e-3, base=names["base"], lr_scale=plain.LR_SCALE)
    assert [(g["param_names"], g["lr"]) for g in groups] == [(g["param_names"], g["lr"]) for g in expected]


def embedded(names: dict[str, Any]) -> None:
    """The counts are those of the page, and the head shares the factors of the table."""
    assert round(names["table"].structure.params / (32_000 * 512), 3) == 0.127
    assert names["model"].lm_head.A is names["model"].model.embed_tokens.A


def convolved(names: dict[str, Any]) -> None:
    """The pattern has as few parameters as the page says, and the model has learning rates."""
    assert names["separable"].structure.params == 8768
    assert names["separable"].dense_weight().numel() == 73_728
    assert {"2.A", "2.B", "4.A", "4.B"} <= {
        n for group in names["optimizer"].param_groups for n in group["param_names"]
    }


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "README.md": landing,
    "docs/index.md": landing,
    "docs/get-started.md": started,
    "docs/guides/train.md": trained,
    "docs/guides/transfer.md": transferred,
    "docs/guides/mixtures.md": mixed,
    "docs/guides/compress.md": compressed,
    "docs/guides/quantize.md": quantised,
    "docs/guides/narrow.md": narrowed,
    "docs/guides/distill.md": distilled,
    "docs/guides/adapters.md": adapted,
    "docs/guides/transformers.md": hugging_face,
    "docs/guides/distributed.md": distributed,
    "docs/guides/embeddings.md": embedded,
    "docs/guides/convolutions.md": convolved,
}
NEEDS = {
    "docs/guides/adapters.md": ["peft", "accelerate"],
    "docs/guides/compress.md": ["scipy"],
    "docs/guides/quantize.md": ["scipy", "torchao"],
    "docs/guides/narrow.md": ["scipy"],
    "docs/guides/faster.md": ["scipy"],
    "docs/guides/distill.md": ["scipy"],
    "docs/guides/train.md": ["pytorch_optimizer", "schedulefree"],
    "docs/guides/transformers.md": ["peft", "accelerate"],
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[needs(package) for package in NEEDS.get(name, [])])
        for name, page in NAMES.items()
        if blocks(page, "python")
    ],
)
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of a page runs from top to bottom, as one script; doctests in it give what they say."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("einlinear.structures.families.FAMILIES", dict(FAMILIES))
    for variable, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(variable, value)
    names: dict[str, Any] = {}
    try:
        for code in blocks(name, "python"):
            if code.startswith(">>>"):
                test = doctest.DocTestParser().get_doctest(code, names, name, name, None)
                result = doctest.DocTestRunner().run(test, clear_globs=False)
                assert result.failed == 0
                names.update(test.globs)
            else:
                exec(compile(code, name, "exec"), names)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    CHECKS.get(name, lambda _: None)(names)


def test_every_check_has_a_page_with_code() -> None:
    assert {*CHECKS} | {*NEEDS} <= {name for name, page in NAMES.items() if blocks(page, "python")}


def commands(name: str) -> Iterator[list[str]]:
    """The words of every `einlinear` command in the shell blocks of a page, without the program's name."""
    for block in blocks(name, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and words[0] != "einlinear" and words[:3] != ["-m", "einlinear", "train"]:
                words.pop(0)
            if words:
                yield words[words.index("einlinear") + 1 :]


@pytest.mark.parametrize("name", [name for name in NAMES if "```bash" in read(name)])
def test_commands(name: str) -> None:
    """Commands and their options exist; NAME=VALUE names an option of a run."""
    for words in commands(name):
        if words[0] == "--import":
            words = words[2:]
        command = load(words[0])
        context = command.make_context(words[0], words[1:])
        config = [word.removeprefix("--") for word in context.params.get("config") or ()]
        known = options_of_a_run([word for word in config if word.startswith("model=")])
        assert {word.partition("=")[0].replace("-", "_") for word in config} <= known


def options_of_a_run(model: list[str]) -> set[str]:
    """Every option of runs with a model: an unknown option is answered with the list of all."""
    answer = CliRunner().invoke(app, ["train", *model, "no_such_option=1"]).output
    return {*re.findall(r"\w+", answer)} | {"model"}


def test_a_wrong_command_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    train, sweep = "einlinear train model=mlp \\\n    widht=3", "PATH=x einlinear sweep --scael small dyad"
    page = f"```bash\n{train}\n```\n```bash\n{sweep}\n```\n"
    monkeypatch.setattr(f"{__name__}.read", lambda _: page)
    assert list(commands("page")) == [["train", "model=mlp", "widht=3"], ["sweep", "--scael", "small", "dyad"]]
    with pytest.raises(AssertionError, match="widht"):
        test_commands("page")


def test_sweep_file(tmp_path: Path) -> None:
    (text,) = blocks("docs/guides/experiments.md", "toml")
    (tmp_path / "my.toml").write_text(text)
    assert len(read_sweep(tmp_path / "my.toml").runs) == 3 * 4 * 3 + 3 * 4 * 3 * 2


def test_every_page_is_in_the_navigation() -> None:
    text = re.sub(r"!!python\S+", "", read("mkdocs.yml"))
    listed = re.findall(r"[\w/-]+\.md", str(yaml.safe_load(text)["nav"]))
    assert len(listed) == len({*listed})
    expected = {name.removeprefix("docs/") for name in NAMES if name.startswith("docs/")}
    assert {*listed} == expected


def test_the_reference_has_every_public_name_and_no_other() -> None:
    library = [name for _, name, package in pkgutil.walk_packages(el.__path__, "einlinear.") if package]
    lab = [name for _, name, package in pkgutil.walk_packages(einlinear_lab.__path__, "einlinear_lab.") if package]
    modules = [importlib.import_module(name) for name in ("einlinear", *library, *lab)]
    public = {f"{m.__name__}.{name}": getattr(m, name) for m in modules for name in getattr(m, "__all__", ())}
    documented: dict[str, Any] = {}
    for name in re.findall(r"^::: (\S+)$", "\n".join(map(read, PAGES)), re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        thing = getattr(importlib.import_module(module), attribute)
        defined_there = getattr(thing, "__module__", module) == module
        assert name in public or defined_there, f"{name} is not public"
        assert not any(thing is other for other in documented.values()), f"{name} is there twice"
        documented[name] = thing
    documented["einlinear.__version__"] = el.__version__
    assert not [name for name, thing in public.items() if not any(thing is other for other in documented.values())]


def test_the_page_of_commands_is_up_to_date_and_has_every_option() -> None:
    """`make docs` writes it."""
    page = tool("cli_reference").page()
    assert read("docs/reference/cli.md") == page
    for name in (name for panel in PANELS.values() for name in panel):
        section = page.partition(f"\n### {name}\n")[2].partition("\n### ")[0]
        options = {option for parameter in load(name).params for option in parameter.opts if option.startswith("--")}
        assert all(f"`{option}`" in section for option in options - {"--help"}), name


def test_the_reference_has_every_environment_variable() -> None:
    rows = re.findall(r"^\| (`.*?) \|", read("docs/reference/environment.md"), re.MULTILINE)
    known, asked = {name for row in rows for name in re.findall("`(.*?)`", row)}, {*read_variables()}
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


@pytest.mark.parametrize("document", [*ROOT_PAGES, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    """In the repository; the build of the site checks them there. Images have alternative text."""
    text = read(document)
    assert "![](" not in text
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)", read(target), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], link


def test_check_of_the_site(tmp_path: Path) -> None:
    """The checker finds each kind of mistake, and nothing else."""
    (tmp_path / "good").mkdir()
    (tmp_path / "good/index.html").write_text('<h2 id="top"></h2><a href="../#top">x</a><img src="../a.png" alt="a">')
    (tmp_path / "a.png").touch()
    (tmp_path / "index.html").write_text(
        '<h2 id="top"></h2><a href="good/#top"></a><a href="https://example.org"></a>'
        '<a href="gone/"></a><a href="good/#gone"></a><img src="a.png" alt=""><script src="https://cdn.org/x.js"></script>'
    )
    assert sorted(tool("check_site").problems(tmp_path)) == [
        "index.html: broken link gone/",
        "index.html: image without alternative text: a.png",
        "index.html: loads https://cdn.org/x.js from the network",
        "index.html: missing anchor good/#gone",
    ]


def test_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every plot is drawn from the committed numbers, and is on a page."""
    plots, drawn = tool("docs_plots"), []
    monkeypatch.setattr(plots, "save", lambda figure, name: (plots.plt.close(figure), drawn.append(name)))
    plots.main()
    pages = "\n".join(map(read, PAGES))
    for name in drawn:
        assert f"images/{name}.png)" in pages
        assert (ROOT / f"docs/images/{name}.png").is_file()


def test_the_citation_is_of_this_version() -> None:
    assert yaml.safe_load(read("CITATION.cff"))["version"] in read("pyproject.toml").partition("version = ")[2][:20]


def test_workflows_are_yaml() -> None:
    files = sorted((ROOT / ".github").rglob("*.yml"))
    assert {file.name for file in files} >= {"tests.yml", "docs.yml", "wheels.yml"}
    for file in files:
        content = yaml.safe_load(read(file))
        assert isinstance(content, dict)
        if file.parent.name == "workflows":
            assert {"name", "jobs", True} <= content.keys()  # YAML reads the key `on` as true
            assert all("runs-on" in job and job["steps"] for job in content["jobs"].values())


def test_contributing(tmp_path: Path) -> None:
    """Do what the guide says, in a copy: its two pieces of code are all that the conformance suite needs."""
    assert len(read("CONTRIBUTING.md").splitlines()) < 80
    assert "grouped" not in FAMILIES
    assert "grouped" not in SAMPLES
    family, row = blocks("CONTRIBUTING.md", "python")
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
