"""Checkpoints on disk: folders that are written atomically, checked when they are read, and never unpickled.

FOLDER/step-00000500 has state.safetensors, with tensors and with metadata as JSON in its metadata, and its sha256.
"""

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from einlinear.files import atomic, differences, sha256_of

FORMAT = "1"
# the newest checkpoint, and one to fall back on
KEPT = 2
_STATE, _DIGEST = "state.safetensors", "sha256"


@dataclass(frozen=True)
class Checkpoint:
    """The number of steps done, tensors by name, and metadata that are JSON."""

    step: int
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint atomically, remove all but the newest ones, and return its folder."""
    place = folder / f"step-{checkpoint.step:08d}"
    try:
        with atomic(place) as scratch:
            scratch.mkdir(parents=True)
            write_tensors(scratch / _STATE, checkpoint.tensors, {"step": checkpoint.step, **checkpoint.metadata})
            (scratch / _DIGEST).write_text(f"{sha256_of(scratch / _STATE)}\n", encoding="ascii")
            # a damaged one, or else this step would not have been made again
            if place.exists():
                shutil.rmtree(place)
    # it says neither what nor where if the disk is full
    except OSError as error:
        raise OSError(f"the checkpoint {place} cannot be written, earlier ones are unchanged: {error}") from error
    _prune(folder, place)
    for abandoned in folder.glob(".step-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    return place


def _prune(folder: Path, newest: Path) -> None:
    """Remove damaged checkpoints and all but the newest intact ones."""
    kept = 1
    for place in sorted({*folder.glob("step-*")} - {newest}, reverse=True):
        with suppress(OSError, ValueError):
            if kept < KEPT:
                _check_digest(place)
                kept += 1
                continue
        shutil.rmtree(place, ignore_errors=True)


def load(place: Path) -> Checkpoint:
    """Read a checkpoint from its folder; ValueError with the reason if it is damaged or of another format."""
    try:
        _check_digest(place)
        tensors, metadata = read_tensors(place / _STATE)
        return Checkpoint(metadata.pop("step"), tensors, metadata)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the checkpoint {place} cannot be used: {error}") from None


def latest(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint that is not damaged, or None. Damaged ones are skipped with a warning."""
    for place in sorted(folder.glob("step-*"), reverse=True):
        try:
            return load(place)
        except ValueError as error:
            warnings.warn(f"{error}; going on from the one before", stacklevel=2)
    return None


def _check_digest(place: Path) -> None:
    if (place / _DIGEST).read_text(encoding="ascii") != f"{sha256_of(place / _STATE)}\n":
        raise ValueError("its content is not what was written")


def check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError, with the differences, if a folder holds a run with another config than this one."""
    if found := differences(before, now):
        hint = "Name another folder, or repeat the config to resume the run"
        raise ValueError(f"{folder} holds a run with another config: {'; '.join(found)}. {hint}")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Any) -> None:
    """Write tensors and JSON metadata to one safetensors file, atomically. Tied weights are written twice.

    Raises OSError if the disk is full.
    """
    separate: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        contiguous = tensor.detach().contiguous()
        storage = contiguous.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory
        separate[name] = contiguous.clone() if storage in storages else contiguous
        storages.add(storage)
    with atomic(path) as scratch:
        try:
            save_file(separate, scratch, metadata={"format": FORMAT, "metadata": json.dumps(metadata)})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def read_tensors(path: Path, mapped: bool = False) -> tuple[dict[str, Tensor], Any]:
    """Read what `write_tensors` wrote, onto the CPU; ValueError if the file is damaged or of another format.

    Those of a file that is `mapped` take no memory that the system could not take back.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"it has format {metadata.get('format')}, but this version reads {FORMAT}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            # Windows cannot remove a file that is mapped
            if not mapped or os.name != "posix":
                tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            return tensors, json.loads(metadata["metadata"])
    except (SafetensorError, KeyError, RecursionError) as error:
        raise ValueError(str(error)) from None
