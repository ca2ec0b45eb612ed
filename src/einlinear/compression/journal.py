"""What a compression has found so far, on disk, so that it can be interrupted and go on."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from einlinear.files import write_json

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
            before = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
            changed = [name for name in settings if before.get(name) != settings[name]]
            if changed:
                raise ValueError(
                    f"{folder} holds {what} with other settings ({', '.join(changed)}): repeat these, name another "
                    "folder, or delete it to start anew"
                )
        else:
            write_json(folder / _SETTINGS, dict(settings))

    def read(self, name: str) -> Any:
        """A result, or None."""
        path = self._path(name, "json")
        return None if path is None or not path.exists() else json.loads(path.read_text(encoding="utf-8"))

    def write(self, name: str, value: Any) -> None:
        if path := self._path(name, "json"):
            write_json(path, value)

    def read_tensors(self, name: str) -> dict[str, Tensor] | None:
        """Tensors, or None."""
        path = self._path(name, "safetensors")
        if path is None or not path.exists():
            return None
        from safetensors.torch import load_file

        return load_file(path)

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        if path := self._path(name, "safetensors"):
            from safetensors.torch import save_file

            scratch = path.with_suffix(f".{os.getpid()}")
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, scratch)
            os.replace(scratch, path)

    def _path(self, name: str, suffix: str) -> Path | None:
        if self._folder is None:
            return None
        plain = re.sub(r"[^\w.-]", "_", name)
        return self._folder / f"{plain}.{suffix}"


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
