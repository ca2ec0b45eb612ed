"""Resume cache: results on disk, with which an interrupted computation resumes."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from einlinear.compression.calibration import InputStatistics
from einlinear.compression.scratch_files import copy_in_file
from einlinear.files import check_folder, read_json, write_json

T = TypeVar("T")


def check_cache_folders(cache_dir: str | Path | None, shared_cache_dir: str | Path | None) -> None:
    """Raise ValueError for arguments of `compress` that cannot be two folders."""
    if cache_dir is not None and cache_dir == shared_cache_dir:
        raise ValueError(f"cache_dir and shared_cache_dir are both {cache_dir}: give two folders")
    for argument, folder in (("cache_dir", cache_dir), ("shared_cache_dir", shared_cache_dir)):
        if folder is not None:
            check_folder(folder, argument)


class ResumeCache:
    """Results by key that depend on one config, each in a file of its own; without a folder none is kept."""

    def __init__(self, folder: str | Path | None, config: Mapping[str, Any], content: str) -> None:
        self._folder = None if folder is None else Path(folder)
        self._config, self._content = dict(config), content
        if self._folder is not None:
            self._has_config(self._folder)

    def _has_config(self, folder: Path) -> bool:
        """Return whether a folder was begun; ValueError if it holds anything else."""
        file = folder / "config.json"
        if not file.is_file():
            if folder.exists() and any(folder.iterdir()):
                raise ValueError(f"{folder} holds files that are not {self._content}: name another folder")
            return False
        try:
            before = dict(read_json(file))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{file} holds no config ({error}): delete {folder} to start anew") from None
        if changed := [name for name in self._config if before.get(name) != self._config[name]]:
            advice = "repeat that config, name another folder, or delete it to start anew"
            raise ValueError(f"{folder} holds {self._content} with another config ({', '.join(changed)}): {advice}")
        return True

    def get_or(
        self, key: str, compute: Callable[[], Any], decode: Callable[[Any], T] = lambda x: x, *, tensors: bool = False
    ) -> T:
        """Read, or compute and write, JSON of a key, or with `tensors` a pair of tensors and JSON, and decode it.

        Tensors stay in their file, from which they are mapped into memory.
        """
        if self._folder is None:
            return decode(compute())
        if tensors:
            # needs safetensors, which is no dependency of the core
            from einlinear.checkpoint import read_tensors, write_tensors

            read: Callable[[Path], Any] = partial(read_tensors, mapped=True)
        else:
            read = read_json
        # the hash keeps keys apart that read alike
        readable, digest = re.sub(r"[^\w.-]+", "_", key)[:80], hashlib.sha256(key.encode()).hexdigest()[:8]
        path = self._folder / f"{readable}-{digest}.{'safetensors' if tensors else 'json'}"
        try:
            record = read(path)
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
        try:
            self._begin(self._folder)
            if tensors:
                write_tensors(path, *record)
                record = read(path)
            else:
                write_json(path, record)
        except OSError as error:
            advice = "the results before it are complete, and the same call resumes"
            raise OSError(f"{path} cannot be written, {advice}: {error}") from error
        return decode(record)

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor in the folder, for this process only; without a folder in memory."""
        if self._folder is not None:
            self._begin(self._folder)
        return copy_in_file(tensor, self._folder)

    def _begin(self, folder: Path) -> None:
        # a computation that fails at once leaves no folder
        if not self._has_config(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "config.json", self._config)


@dataclass(frozen=True)
class LayerResults:
    """Results of one step of `compress`, layer by layer, from the inputs of each."""

    step: str
    layers: int
    damping: float
    cache: ResumeCache
    progress: Callable[[str, int, int], None]

    def cached(self, layer: str, done: int, collect: Callable[[], InputStatistics]) -> Callable[..., Any]:
        """Return `ResumeCache.get_or` for functions of a layer's inputs and their damped second moment."""

        def get_or(
            content: str,
            compute: Callable[[InputStatistics, Tensor], Any],
            decode: Callable[[Any], Any] = lambda x: x,
            *,
            tensors: bool = False,
        ) -> Any:
            def record() -> Any:
                inputs = collect()
                self.report(done)
                try:
                    return compute(inputs, inputs.damped(self.damping))
                except (torch.linalg.LinAlgError, ValueError) as error:  # type: ignore[attr-defined]
                    advice = f"give more calibration data, or a larger damping than {self.damping:g}"
                    raise ValueError(f"{layer} cannot be fitted to its inputs: {error}; {advice}") from error

            return self.cache.get_or(f"{content} of {layer}", record, decode, tensors=tensors)

        return get_or

    def report(self, done: int) -> None:
        self.progress(self.step, done, self.layers)


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
