"""Resume cache: results on disk, with which an interrupted computation resumes."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from einlinear.files import read_json, write_json

T = TypeVar("T")


class ResumeCache:
    """Results by key that depend on one config, each in a file of its own; without a folder none is kept."""

    def __init__(self, folder: str | Path | None, config: Mapping[str, Any], content: str) -> None:
        self._folder = None if folder is None else Path(folder)
        if self._folder is None:
            return
        file = self._folder / "config.json"
        if not file.is_file():
            if self._folder.exists() and any(self._folder.iterdir()):
                raise ValueError(f"{folder} holds files that are not {content}: name another folder")
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json(file, dict(config))
            return
        try:
            before = dict(read_json(file))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{file} holds no config ({error}): delete {folder} to start anew") from None
        if changed := [name for name in config if before.get(name) != config[name]]:
            advice = "repeat that config, name another folder, or delete it to start anew"
            raise ValueError(f"{folder} holds {content} with another config ({', '.join(changed)}): {advice}")

    def get_or(
        self, key: str, compute: Callable[[], Any], decode: Callable[[Any], T] = lambda x: x, tensors: bool = False
    ) -> T:
        """Read, or compute and write, JSON of a key, or with `tensors` a pair of tensors and JSON, and decode it."""
        if self._folder is None:
            return decode(compute())
        if tensors:
            # needs safetensors, which is no dependency of the core
            from einlinear.checkpoint import read_tensors, write_tensors
        # the hash keeps keys apart that read alike
        readable, digest = re.sub(r"[^\w.-]+", "_", key)[:80], hashlib.sha256(key.encode()).hexdigest()[:8]
        path = self._folder / f"{readable}-{digest}.{'safetensors' if tensors else 'json'}"
        try:
            record = (read_tensors if tensors else read_json)(path)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            warnings.warn(f"{path} is damaged, so its result is computed again: {error}", stacklevel=2)
        else:
            try:
                return decode(record)
            except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
                cause = f"{type(error).__name__}: {error}"
                raise ValueError(f"{path} does not hold a result for {key} ({cause}): delete the file") from error
        record = compute()
        if tensors:
            write_tensors(path, *record)
        else:
            write_json(path, record)
        return decode(record)


def digest_of(model: nn.Module, batches: Iterable[Any] | None) -> str:
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
    # the memory of a contiguous CPU tensor, which is not copied
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
