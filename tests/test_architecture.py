"""The order of the folders, as docs/architecture.md says: who may import whom, also inside functions."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import einlinear

LIBRARY = Path(einlinear.__file__).parent
LAB = LIBRARY.with_name("einlinear_lab")
# "einlinear" is the library's own __init__: what it may export comes before it
LIBRARY_ORDER = (
    "files",
    "tables",
    "version",
    "import_hooks",
    "checkpoint",
    "schedules",
    "structures",
    "ops",
    "nn",
    "fusion",
    "mup",
    "conversion",
    "adapters",
    "compression",
    "integrations",
    "einlinear",
)
LAB_ORDER = (
    "models",
    "data",
    "training",
    "pretrained",
    "runs",
    "pools",
    "sweeps",
    "search",
    "coordinate_check",
    "scaling",
    "analysis",
    "report",
    "bench",
    "cli",
)
# folders that a later one does not need all the same
LAB_APART = {
    "pretrained": {"models", "training"},
    "coordinate_check": {"pools", "search"},
    "scaling": {"pools", "sweeps", "search", "coordinate_check"},
    "analysis": {"pools", "sweeps", "search", "coordinate_check"},
    "report": {"pools", "sweeps", "search"},
    "bench": {*LAB_ORDER} - {"models", "bench"},
}


def imported(file: Path) -> Iterator[str]:
    """The modules that a file imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def folders(file: Path, package: str, order: tuple[str, ...]) -> set[str]:
    """The folders of a package that a file imports from; the package itself where it is none of them."""
    parts = [name.split(".") for name in imported(file) if name.split(".")[0] == package]
    return {part[1] if part[1:] and part[1] in order else package for part in parts}


def sources(root: Path, folder: str) -> list[Path]:
    files = [*root.glob(f"{folder}.py"), *(root / folder).rglob("*.py")]
    assert files, folder
    return files


def test_the_library_never_imports_the_lab() -> None:
    for file in LIBRARY.rglob("*"):
        if file.suffix in (".py", ".cpp", ".h", ".json"):
            text = file.read_text(encoding="utf-8")
            assert "einlinear_lab" not in text, file
            # its messages advise arguments, except for the one command that no function replaces
            assert file.suffix != ".py" or "--" not in text.replace("einlinear bench --calibrate", ""), file
    code = "import einlinear, sys; assert not any(name.startswith('einlinear_lab') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("folder", LIBRARY_ORDER)
def test_a_folder_of_the_library_imports_only_from_those_above_it(folder: str) -> None:
    above = {*LIBRARY_ORDER[: LIBRARY_ORDER.index(folder) + 1]}
    for file in sources(LIBRARY, "__init__" if folder == "einlinear" else folder):
        assert folders(file, "einlinear", LIBRARY_ORDER) <= above, file


@pytest.mark.parametrize("folder", LAB_ORDER)
def test_a_folder_of_the_lab_imports_only_from_those_above_it(folder: str) -> None:
    above = {*LAB_ORDER[: LAB_ORDER.index(folder) + 1]} - LAB_APART.get(folder, set())
    for file in sources(LAB, folder):
        assert folders(file, "einlinear_lab", LAB_ORDER) <= above, file


def test_images_and_text_know_nothing_of_each_other() -> None:
    for folder, other in (("images", "text"), ("text", "images")):
        for file in sources(LAB / "data", folder):
            assert not any(name.startswith(f"einlinear_lab.data.{other}.") for name in imported(file)), file


@pytest.mark.parametrize(("root", "order"), [(LIBRARY, LIBRARY_ORDER), (LAB, LAB_ORDER)])
def test_every_folder_has_its_place(root: Path, order: tuple[str, ...]) -> None:
    inside = {path.parent.name for path in root.glob("*/__init__.py")}
    files = {path.stem for path in root.glob("*.py")} - {"__init__", "__main__"}
    assert inside | files == {*order} - {"einlinear"}


def test_no_two_modules_of_the_library_share_a_name() -> None:
    names = [path.stem for path in LIBRARY.rglob("*.py") if path.stem != "__init__"]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("root", [LIBRARY, LAB])
def test_no_module_is_named_like_a_function_it_defines(root: Path) -> None:
    for path in root.rglob("*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert path.stem not in {node.name for node in body if isinstance(node, ast.FunctionDef)}, path


def test_no_two_public_classes_share_a_name() -> None:
    names: dict[str, Path] = {}
    for path in (*LIBRARY.rglob("*.py"), *LAB.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                assert node.name not in names, f"{node.name} in {path} and in {names[node.name]}"
                names[node.name] = path
