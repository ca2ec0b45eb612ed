"""Build hook of hatchling: compile the CPU kernels into the wheel, so that its users need no compiler.

Without a compiler the wheel has Python code only, which is an error where CI=true. Editable installations and source
distributions are left alone. $CXX and $CXXFLAGS apply.
"""

import os
import platform
import runpy
import shlex
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "einlinear/ops/cpu"


class PrebuiltKernels(BuildHookInterface):
    """One library for each dtype and target of this kind of machine (src/einlinear/ops/cpu/toolchain.py)."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        self.scratch = tempfile.TemporaryDirectory()
        sources = Path(self.root, "src", PACKAGE)
        toolchain = runpy.run_path(str(sources / "toolchain.py"))
        targets = toolchain["TARGETS"].get(platform.machine())
        if version == "editable" or not targets:
            return
        try:
            command = [*toolchain["find_compiler"](), *toolchain["FLAGS"], *shlex.split(os.environ.get("CXXFLAGS", ""))]
            builds = {
                f"{name}-{dtype}": [*command, *target.flags, toolchain["flag_of"](dtype)]
                for name, target in targets.items()
                for dtype in toolchain["NUMBERS"]
            }
            libraries = compile_all(builds, sources / "kernel.cpp", Path(self.scratch.name))
        except (OSError, RuntimeError) as error:
            if os.environ.get("CI") == "true":
                raise
            self.app.display_warning(f"The wheel has no compiled kernels, so it runs on any machine: {error}")
            return
        build_data["force_include"] |= {str(library): f"{PACKAGE}/{library.name}" for library in libraries}
        # for any Python, because the kernels are called through ctypes
        system = sysconfig.get_platform().replace("universal2", platform.machine())
        build_data["tag"] = "py3-none-" + system.replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        self.scratch.cleanup()


def compile_all(builds: dict[str, list[str]], source: Path, folder: Path) -> list[Path]:
    """Return a library in a folder for each name and command. Raises RuntimeError if one does not compile."""

    def compile_one(name: str) -> Path:
        library = folder / f"kernel-{name}.so"
        command = [*builds[name], str(source), "-o", str(library)]
        run = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if run.returncode:
            raise RuntimeError(f"{command[0]!r} does not compile {source.name} for {name}: {run.stderr.strip()}")
        return library

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, builds))
