"""What a compression has found so far, on disk, so that it can be interrupted and go on."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from einlinear.files import read_json, rename, write_json

T = TypeVar("T")

_SETTINGS = "settings.json"


class Journal:
    """Named results in a folder, each in a file of its own that is there whole or not at all.

    Args:
        folder: made if it is not there; None: nothing is kept.
        settings: what the results depend on, as JSON values.
        what: they are, in messages.

    Raises:
        ValueError: the folder holds something else, or results of other settings: it says which.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], what: str) -> None:
        self._folder = folder
        if folder is None:
            return
        if folder.exists() and not (folder / _SETTINGS).is_file() and any(folder.iterdir()):
            raise ValueError(f"{folder} holds files that are not {what}: name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / _SETTINGS).is_file():
            before = _settings(folder / _SETTINGS)
            changed = [name for name in settings if before.get(name) != settings[name]]
            if changed:
                raise ValueError(
                    f"{folder} holds {what} with other settings ({', '.join(changed)}): repeat these, name another "
                    "folder, or delete it to start anew"
                )
        else:
            write_json(folder / _SETTINGS, dict(settings))

    def read(self, name: str) -> Any:
        """A result, or None: also where its file is damaged, which is warned about."""
        return _whole(self._path(name, "json"), read_json)

    def write(self, name: str, value: Any) -> None:
        if path := self._path(name, "json"):
            write_json(path, value)

    def read_tensors(self, name: str) -> dict[str, Tensor] | None:
        """Tensors, or None: also where their file is damaged, which is warned about."""
        from safetensors.torch import load_file

        return _whole(self._path(name, "safetensors"), load_file)

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        if path := self._path(name, "safetensors"):
            from safetensors.torch import save_file

            scratch = path.with_suffix(f".{os.getpid()}")
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, scratch)
            rename(scratch, path)

    def _path(self, name: str, suffix: str) -> Path | None:
        if self._folder is None:
            return None
        plain = re.sub(r"[^\w.-]", "_", name)
        return self._folder / f"{plain}.{suffix}"


def _settings(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Delete {path.parent} to start anew") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no settings. Delete {path.parent} to start anew")
    return content


def _whole(path: Path | None, read: Callable[[Path], T]) -> T | None:
    """What is in a file; None where there is none, or where it is damaged and has to be made again."""
    if path is None or not path.exists():
        return None
    from safetensors import SafetensorError

    try:
        return read(path)
    except (OSError, ValueError, SafetensorError) as error:
        warnings.warn(f"{path} is damaged, so what it held is computed again: {error}", stacklevel=3)
        return None


def digest_of(model: nn.Module, batches: Iterable[Any] | None) -> str:
    """What tells one model on its data from another: a hash of all their numbers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes(tensor))
    for batch in batches or ():
        values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else [batch]
        for value in values:
            digest.update(_bytes(value) if isinstance(value, Tensor) else repr(value).encode())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    """Without a copy of them."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
