"""Folders of transformers models: loaded, and written again with the compressed model and all other files."""

from __future__ import annotations

import glob
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError

from einlinear.compression.compression_report import CompressionReport
from einlinear.files import atomic, read_json, write_json

REPORT = "compression.json"
_ADAPTER = "adapter_config.json"
_CONFIG = "config.json"
# Of sentence-transformers: the modules of a pipeline and their folders.
_MODULES = "modules.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".onnx_data", ".gguf")
# Of sharded weights.
_INDEX = ".index.json"
# Folders with copies of the weights: in another format, or from the training.
_COPIES = re.compile(r"onnx|openvino|coreml|original|checkpoint-\d+|__pycache__|\..*")


def load(source: str | Path, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """Load a model, as the class that saved it, and its tokenizer, or None if it has none.

    The source is a folder that `save_pretrained` or sentence-transformers wrote, or a name on the Hugging Face hub.
    """
    try:
        place = torch.zeros((), device=device).device
    # AssertionError: torch was built without CUDA.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {error}") from None
    root = _existing_folder(source)
    try:
        if (root / _ADAPTER).is_file():
            raise ValueError(
                f"{source} holds an adapter ({_ADAPTER}). Merge it into its model first and save that, with peft: "
                "AutoPeftModel.from_pretrained(...).merge_and_unload().save_pretrained(FOLDER)"
            )
        # Code that comes with a model is never run, and transformers does not ask.
        arguments = {"subfolder": subfolder_of_model(root), "trust_remote_code": False}
        config = transformers.AutoConfig.from_pretrained(source, **arguments)
        classes = [getattr(transformers, name, None) for name in config.architectures or ()]
        model_class: Any = next(filter(None, classes), transformers.AutoModel)
        model = model_class.from_pretrained(source, dtype=dtype, **arguments).eval().to(place)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} is not a model that transformers can load: {error}") from None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **arguments)
    # Without its files, every class of tokenizer raises another kind of error.
    except Exception:
        return model, None
    # Or none, and has no words: every text would be the same.
    return model, tokenizer if len(tokenizer) > len(tokenizer.all_special_ids) else None


def _existing_folder(source: str | Path) -> Path:
    """Return the folder of a model as `_snapshot`; ValueError in one line if there is none."""
    if Path(source).exists():
        return Path(source)
    missing, names = f"there is no folder {source}", "names on the hub look like owner/name"
    # no name on the hub is like this
    if str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise ValueError(f"{missing}; {names}")
    try:
        return _snapshot(source)
    except (OSError, HFValidationError) as error:
        reason = f"no model of this name could be fetched from the hub ({type(error).__name__})"
        raise ValueError(f"{missing}, and {reason}; {names}") from None


def _snapshot(source: str | Path) -> Path:
    """Return the folder of a model; that of a model on the hub is downloaded, without weights."""
    if Path(source).is_dir():
        return Path(source)
    folder = Path(snapshot_download(str(source), ignore_patterns=[f"*{ending}" for ending in _WEIGHTS]))
    if modules := {*module_paths(folder)} - {subfolder_of_model(folder), ""}:
        snapshot_download(str(source), allow_patterns=[f"{path}/*" for path in sorted(modules)])
    return folder


def subfolder_of_model(folder: Path) -> str:
    """Return the subfolder of config and weights: "" for the folder itself, else the path of a module."""
    if (folder / _CONFIG).is_file():
        return ""
    return next((path for path in module_paths(folder) if _is_transformer(folder / path)), "")


def module_paths(folder: Path) -> list[str]:
    """Return the paths in modules.json, in order; none without that file. Raises ValueError if it is damaged."""
    file = folder / _MODULES
    if not file.is_file():
        return []
    try:
        paths = [str(module["path"]) for module in read_json(file)]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: it is not a list of modules with a path each ({error!r})") from None
    for path in paths:
        if PurePosixPath(path).is_absolute() or ".." in Path(path).parts:
            raise ValueError(f"{file} names the path {path!r}, which leads out of the folder")
    return paths


def _is_transformer(folder: Path) -> bool:
    try:
        return "model_type" in read_json(folder / _CONFIG)
    except (OSError, ValueError, TypeError):
        return False


def save(
    model: Any,
    tokenizer: Any,
    report: CompressionReport,
    out: Path,
    source: str | Path,
    config: Mapping[str, str],
    shard_bytes: int | None = None,
) -> list[str]:
    """Write a compressed model, its report, the command's config and other files of its source to a new folder.

    The weights are in files of at most `shard_bytes`, or of the size that transformers chooses. Returns the files of
    the source that were left out, see `copy_side_files`.
    """
    with atomic(out) as folder:
        root = _snapshot(source)
        subfolder = subfolder_of_model(root)
        place = folder / subfolder
        place.mkdir(parents=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(place)
        # Replaces the tokenizer's files by the original ones.
        left_out = copy_side_files(root, folder, subfolder)
        sharding = {} if shard_bytes is None else {"max_shard_size": shard_bytes}
        try:
            model.save_pretrained(place, **sharding)
        except SafetensorError as error:
            raise OSError(f"the weights cannot be written to {out.parent}: {error}") from error
        metadata = asdict(report)
        for layer in metadata["layers"]:
            # JSON has no NaN, which stands for layers that are not timed
            speeds = layer["speed_up"]["by_tokens"].items()
            layer["speed_up"]["by_tokens"] = {tokens: None if math.isnan(ratio) else ratio for tokens, ratio in speeds}
        content = {"layers": metadata["layers"], "skipped": dict(report.skipped), "coverage": metadata["coverage"]}
        write_json(folder / REPORT, {**content, "config": dict(config)})
    return left_out


def copy_side_files(source: Path, out: Path, model: str = "") -> list[str]:
    """Copy the tokenizer, processors, templates and other files of a model's folder, none executable, into `out`.

    Returns the relative paths that were left out: the weights in the subfolder `model`, hidden folders, folders with
    copies of the weights, and links that lead out of the folder.
    """
    root, model_folder = source.resolve(), Path(model)
    # Snapshots of the Hugging Face cache link to its blobs.
    inside = [root]
    if root.parent.name == "snapshots":
        inside.append(root.parent.parent / "blobs")
    modules = {Path(path) for path in module_paths(root)}
    left_out = []
    for folder, folders, files in os.walk(root):
        place = Path(folder).relative_to(root)
        for name in sorted(folders):
            path = place / name
            if (root / path).is_symlink():
                left_out.append(f"{path}/ (a linked folder)")
            elif path not in modules and _COPIES.fullmatch(name):
                folders.remove(name)
                left_out.append(f"{path}/")
        folders.sort()
        for name in sorted(files):
            path = place / name
            target = (root / path).resolve()
            if place == model_folder and name.endswith((*_WEIGHTS, _INDEX)):
                left_out.append(str(path))
            elif not any(target.is_relative_to(parent) for parent in inside):
                left_out.append(f"{path} (a link out of the folder)")
            elif not target.is_file():
                left_out.append(f"{path} (not a regular file)")
            else:
                (out / place).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(target, out / path)
    return left_out


def finish(out: Path, unfinished: Path, config: Mapping[str, str]) -> bool:
    """Remove what killed commands left beside `out`, while holding its lock.

    Returns whether the same command had written all of `out`, and was killed before it removed its resume cache.
    """
    for left in out.parent.glob(f".{glob.escape(out.name)}.*"):
        # Scratch folders of `save`.
        if left.suffix[1:].isdigit():
            shutil.rmtree(left, ignore_errors=True)
    try:
        was_complete = unfinished.exists() and read_json(out / REPORT).get("config") == dict(config)
    except (OSError, ValueError, AttributeError):
        return False
    if was_complete:
        shutil.rmtree(unfinished)
    return was_complete
