"""The folder of compiled kernels: nothing is loaded that others could have put there, and no damage lasts."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import pytest
import torch

from einlinear.files import check_private
from einlinear.ops.cpu import kernel_library as kernels

pytestmark = pytest.mark.skipif(os.name != "posix", reason="owners and modes are those of POSIX")

NATIVE = ("-march=native",)


@pytest.fixture(scope="module")
def compiled() -> Path:
    """The kernels, as this machine has them."""
    return kernels.build(NATIVE, "float32")


@pytest.fixture
def cache(tmp_path: Path, compiled: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a compiler that takes no time: it copies the kernels, and counts its calls."""
    script = tmp_path / "compiler"
    script.write_text(
        f"""#!/bin/sh
echo call >> {tmp_path}/calls
while [ "$1" != -o ]; do shift; done
{tmp_path}/meanwhile "$2" 2> /dev/null
cp {compiled} "$2"
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("EINLINEAR_CACHE", str(tmp_path / "cache"))
    kernels.load.cache_clear()
    yield tmp_path / "cache"
    kernels.load.cache_clear()


def calls(cache: Path) -> int:
    log = cache.parent / "calls"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_the_folder_is_private(cache: Path) -> None:
    before = os.umask(0)
    try:
        path = kernels.build(NATIVE, "float32")
    finally:
        os.umask(before)
    for place in (cache, path.parent, path):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700, place
    assert {p.name for p in path.parent.iterdir()} == {path.name, ".lock"}
    assert kernels.build(NATIVE, "float32") == path
    assert calls(cache) == 1


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Replaces a library by one that leaves a trace where it is loaded; returns where."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "a.c").write_text(
        f'#include <stdio.h>\n__attribute__((constructor)) void run(void) {{ fopen("{folder}/trace", "w"); }}\n'
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "a.so", folder / "a.c"], check=True)

    def plant(path: Path) -> Path:
        path.unlink()
        shutil.copyfile(folder / "a.so", path)
        (folder / "trace").unlink(missing_ok=True)
        return folder / "trace"

    return plant


def others_write_the_folder(path: Path) -> None:
    path.parent.chmod(0o777)


def the_group_writes_the_folder(path: Path) -> None:
    if os.geteuid() == 0:
        os.chown(path.parent, -1, 1)
    path.parent.chmod(0o770)


def others_write_the_cache(path: Path) -> None:
    path.parent.parent.chmod(0o777)


def others_write_above(path: Path) -> None:
    path.parent.parent.parent.chmod(0o777)


def others_write_a_sticky_folder(path: Path) -> None:
    path.parent.chmod(0o1777)


def others_write_where_a_link_lies(path: Path) -> None:
    cache = path.parent.parent
    (cache.parent / "open").mkdir()
    cache.rename(cache.parent / "real")
    cache.symlink_to("open/link")
    (cache.parent / "open" / "link").symlink_to("../real")
    (cache.parent / "open").chmod(0o777)


def another_owns(what: Callable[[Path], Path]) -> Callable[[Path], None]:
    return lambda path: os.chown(what(path), 12345, -1)


UNSAFE = [
    others_write_the_folder,
    the_group_writes_the_folder,
    others_write_the_cache,
    others_write_above,
    others_write_a_sticky_folder,
    others_write_where_a_link_lies,
    *(
        pytest.param(
            another_owns(what),
            id=f"another user owns {name}",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away"),
        )
        for name, what in (("the folder", lambda path: path.parent), ("the cache", lambda path: path.parent.parent))
    ),
]


@pytest.mark.parametrize("spoil", UNSAFE)
def test_nothing_is_loaded_where_others_can_write(
    spoil: Callable[[Path], None],
    cache: Path,
    hostile: Callable[[Path], Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = kernels.build(NATIVE, "float32")
    trace = hostile(path)
    spoil(path)
    why = kernels.load(torch.float32)
    assert isinstance(why, str)
    assert "can be changed by others" in why or "belongs to another user (number 12345)" in why
    assert "name another folder in EINLINEAR_CACHE" in why
    assert why in caplog.text
    assert not trace.exists()
    assert calls(cache) == 1, "nothing is written there, either"


def test_a_sticky_folder_above_is_safe(cache: Path) -> None:
    """As in /tmp: others can make files there, but not move this user's."""
    cache.parent.chmod(0o1777)
    assert isinstance(kernels.load(torch.float32), kernels.Library)


def test_a_link_to_a_safe_folder_is_safe(cache: Path) -> None:
    (cache.parent / "real").mkdir(mode=0o700)
    cache.symlink_to("real/../real")
    assert isinstance(kernels.load(torch.float32), kernels.Library)
    cache.unlink()
    cache.symlink_to(cache)
    kernels.load.cache_clear()
    assert isinstance(kernels.load(torch.float32), str), "a link to itself ends"


@pytest.mark.skipif(os.geteuid() == 0, reason="root's files are trusted by all")
def test_a_folder_of_another_user(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.build(NATIVE, "float32")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(PermissionError, match="belongs to another user"):
        kernels.build(NATIVE, "float32")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def altered(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_link_to_a_folder(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent.parent)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def others_write_the_file(path: Path) -> None:
    path.chmod(0o777)


@pytest.mark.parametrize(
    "damage", [truncated, empty, altered, a_pipe, a_folder, a_link_to_a_folder, others_write_the_file]
)
def test_a_damaged_file_is_compiled_anew(damage: Callable[[Path], None], cache: Path) -> None:
    path = kernels.build(NATIVE, "float32")
    damage(path)
    assert isinstance(kernels.load(torch.float32), kernels.Library)
    assert calls(cache) == 2
    assert {p.name for p in path.parent.iterdir()} == {path.name, ".lock"}


def test_a_file_without_symbols_is_never_loaded(cache: Path, hostile: Callable[[Path], Path]) -> None:
    trace = hostile(kernels.build(NATIVE, "float32"))
    assert isinstance(kernels.load(torch.float32), kernels.Library)
    assert not trace.exists()


def test_a_compiler_that_makes_something_else(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.c").touch()
    script = tmp_path / "another"
    script.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nexec cc -shared -o "$2" {tmp_path}/empty.c\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    why = kernels.load(torch.float32)
    assert isinstance(why, str)
    assert "forward" in why
    kernels.load.cache_clear()
    monkeypatch.setenv("CXX", "echo")
    why = kernels.load(torch.float32)
    assert isinstance(why, str)
    assert "'echo' does not compile kernel.cpp" in why


def test_a_compiler_with_arguments(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"env A=1 {os.environ['CXX']}")
    assert isinstance(kernels.load(torch.float32), kernels.Library)
    assert calls(cache) == 1
    kernels.load.cache_clear()
    monkeypatch.setenv("CXX", 'g++ "')
    why = kernels.load(torch.float32)
    assert isinstance(why, str)
    assert "is not a command" in why


def test_kernels_can_be_turned_off(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("EINLINEAR_KERNELS", "0")
    assert kernels.load(torch.float32) == "they are turned off by EINLINEAR_KERNELS=0"
    assert calls(cache) == 0
    assert not caplog.records


def test_one_compiles_and_what_killed_ones_left_is_removed(cache: Path) -> None:
    folder = cache / "kernels"
    folder.mkdir(mode=0o700, parents=True)
    killed, of_another_machine, of_before = (
        folder / name for name in (f"{kernels._SCRATCH}x", ".build-another-x", "tmpabc")
    )
    for left in (killed, of_another_machine, of_before):
        left.mkdir()
        (left / "kernel.so").touch()

    meanwhile = cache.parent / "meanwhile"  # is run by the compiler
    meanwhile.write_text("#!/bin/sh\nsleep 0.5\n")
    meanwhile.chmod(0o755)
    with ThreadPoolExecutor(3) as pool:  # with a lock each, as processes have
        (path,) = set(pool.map(kernels.build, [NATIVE] * 3, ["float32"] * 3))
    assert calls(cache) == 1
    assert not killed.exists()
    assert of_another_machine.exists(), "it may be at work"
    assert of_before.exists()

    path.unlink()
    for left in (of_another_machine, of_before):
        os.utime(left, (0, 0))
    assert kernels.build(NATIVE, "float32") == path
    assert {p.name for p in folder.iterdir()} == {path.name, ".lock"}


def test_without_locks_it_is_compiled_beside(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: object, **__: object) -> None:
        raise NotImplementedError("no locks here")

    (cache / "kernels").mkdir(mode=0o700, parents=True)
    left = cache / "kernels" / f"{kernels._SCRATCH}x"
    left.mkdir()
    monkeypatch.setattr(filelock.FileLock, "acquire", unsupported)
    assert isinstance(kernels.load(torch.float32), kernels.Library)
    assert left.exists(), "it may be at work"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_group_of_ones_own_is_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every user has a group, folders may be writable for it by default."""
    import grp
    import pwd

    folder = tmp_path / "a"
    folder.mkdir()
    folder.chmod(0o770)
    number = folder.stat().st_gid
    user = pwd.struct_passwd(("anna", "x", os.geteuid(), number or 7, "", "", ""))
    members: list[str] = []
    monkeypatch.setattr(pwd, "getpwuid", lambda _: user)
    monkeypatch.setattr(grp, "getgrgid", lambda _: grp.struct_group(("anna", "x", number or 7, members)))
    check_private(folder)
    members.append("bert")
    with pytest.raises(PermissionError, match="mode is 0770"):
        check_private(folder)
