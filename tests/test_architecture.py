"""The order of the folders: what docs/architecture.md says of imports, also of those inside functions."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import einlinear

ROOT = Path(einlinear.__file__).parent
# "einlinear" is the library's own __init__: what it may export comes before it
ORDER = (
    "files",
    "rows",
    "version",
    "import_hooks",
    "checkpoint",
    "structures",
    "ops",
    "nn",
    "parametrize",
    "huggingface",
    "conversion",
    "compression",
    "bench",
    "data",
    "training",
    "experiments",
    "einlinear",
    "cli",
)


def imported(file: Path) -> Iterator[str]:
    """The modules that a file imports from this library."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("folder", ORDER)
def test_a_folder_imports_only_from_those_above_it(folder: str) -> None:
    own = "__init__" if folder == "einlinear" else folder
    files = [*ROOT.glob(f"{own}.py"), *(ROOT / folder).rglob("*.py")]
    above = {*ORDER[: ORDER.index(folder) + 1]}
    if folder == "bench":
        above -= {"parametrize", "conversion", "compression"}
    assert files
    for file in files:
        parts = [name.split(".") for name in imported(file) if name.split(".")[0] == "einlinear"]
        found = {part[1] if part[1:] and part[1] in ORDER else "einlinear" for part in parts}
        assert found <= above, file


def test_so_do_those_of_the_experiments() -> None:
    order = ("runs", "sweeps", "search", "findings", "report")
    inside = ROOT / "experiments"
    assert {path.parent.name for path in inside.glob("*/__init__.py")} == {*order}
    for i, folder in enumerate(order):
        for file in (inside / folder).rglob("*.py"):
            parts = [name.split(".") for name in imported(file) if name.startswith("einlinear.experiments")]
            assert {part[2] for part in parts} <= {*order[: i + 1]} - ({"sweeps", "search"} if i > 2 else set()), file


def test_images_and_text_know_nothing_of_each_other() -> None:
    for folder, other in (("images", "text"), ("text", "images")):
        files = list((ROOT / "data" / folder).rglob("*.py"))
        assert files
        for file in files:
            assert not any(name.startswith(f"einlinear.data.{other}.") for name in imported(file)), file


def test_every_folder_has_its_place() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    files = {path.stem for path in ROOT.glob("*.py")} - {"__init__", "__main__"}
    assert folders | files == {*ORDER} - {"einlinear"}
