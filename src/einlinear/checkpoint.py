"""Checkpoints on disk: each is a folder that is whole or absent, checked before it is believed, never unpickled.

FOLDER/step-00000500/state.safetensors   tensors, and facts as JSON in the file's own metadata
FOLDER/step-00000500/sha256              of that file
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from einlinear.files import differences, rename, sha256_of

FORMAT = "1"
KEPT = 2  # the newest one, and one to fall back on
_STATE, _DIGEST = "state.safetensors", "sha256"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says: after how many steps, tensors by name, and facts that are JSON."""

    step: int
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint beside its place, move it there, and remove all but the newest ones.

    Raises:
        OSError: the disk is full, or the folder cannot be written. What was there before is still there.
    """
    place = folder / f"step-{checkpoint.step:08d}"
    scratch = folder / f".{place.name}.{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed, and had the same number
    scratch.mkdir(parents=True)
    try:
        facts = {"step": checkpoint.step, **checkpoint.facts}
        save_file(_apart(checkpoint.tensors), scratch / _STATE, metadata={"format": FORMAT, "facts": json.dumps(facts)})
        (scratch / _DIGEST).write_text(f"{sha256_of(scratch / _STATE)}\n", encoding="ascii")
        if place.exists():  # a damaged one, or else this step would not have been made again
            shutil.rmtree(place)
        rename(scratch, place)
        _intact.add(_state_of(place))
    except (OSError, SafetensorError) as error:  # which says neither what nor where if the disk is full
        raise OSError(f"the checkpoint {place} cannot be written, those before it are as they were: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _prune(folder, place)
    for left in folder.glob(".step-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    return place


def _prune(folder: Path, newest: Path) -> None:
    """Remove all but the newest ones that are whole: one that is damaged displaces none of these, whatever its step."""
    kept = {newest}
    for place in _folders(folder):
        if place != newest and (len(kept) == KEPT or not _is_intact(place)):
            shutil.rmtree(place, ignore_errors=True)
        else:
            kept.add(place)


_intact: set[tuple[Path, int, int]] = set()  # what this process has written or read, so that it is not read again


def _state_of(place: Path) -> tuple[Path, int, int]:
    """Changes if the state of a checkpoint does."""
    status = (place / _STATE).stat()
    return place, status.st_mtime_ns, status.st_size


def _is_intact(place: Path) -> bool:
    try:
        if _state_of(place) in _intact:
            return True
        _check_digest(place)
    except (OSError, ValueError):
        return False
    return True


def _check_digest(place: Path) -> None:
    if (place / _DIGEST).read_text(encoding="ascii") != f"{sha256_of(place / _STATE)}\n":
        raise ValueError("its content is not what was written")
    _intact.add(_state_of(place))


def load(place: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        ValueError: it is damaged or of another format; the message says which.
    """
    try:
        _check_digest(place)
        with safe_open(place / _STATE, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"it has format {metadata.get('format')}, but this version reads {FORMAT}")
            facts = json.loads(metadata["facts"])
            # Copies: a file that is still mapped cannot be removed everywhere.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return Checkpoint(facts.pop("step"), tensors, facts)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the checkpoint {place} cannot be used: {error}") from None


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; None where there is none. Damaged ones are warned about and passed over."""
    for place in _folders(folder):
        try:
            return load(place)
        except ValueError as error:
            warnings.warn(f"{error}; going on from the one before", stacklevel=2)
    return None


def check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError, saying what differs, if the facts of the run in a folder are not those of this one."""
    found = differences(before, now)
    if found:
        raise ValueError(
            f"{folder} holds a run of other settings: {'; '.join(found)}. Name another folder (--out), or repeat "
            "the settings to resume the run"
        )


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each with memory of its own, as safetensors wants it: tied weights are written twice."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.contiguous()
        place = whole.untyped_storage().data_ptr()
        found[name] = whole.clone() if place in seen else whole
        seen.add(place)
    return found


def _folders(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    return sorted(folder.glob("step-*"), reverse=True)
