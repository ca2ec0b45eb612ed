"""The files of a model's folder beside its weights: tokenizer, processors, templates, the modules of a pipeline."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path, PurePosixPath

MODULES = "modules.json"  # of sentence-transformers: the modules of a pipeline and their folders
_CONFIG = "config.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".onnx_data", ".gguf")
_INDEX = ".index.json"  # of weights in several files
# Folders that hold the same weights once more: in another format, or as they were during the training.
_COPIES = re.compile(r"onnx|openvino|coreml|original|checkpoint-\d+|__pycache__|\..*")


def subfolder_of_model(folder: Path) -> str:
    """Where in a folder the transformer is: "" for the folder itself, else the path of a module of modules.json.

    Raises:
        ValueError: modules.json is damaged, or names a path out of the folder.
    """
    if (folder / _CONFIG).is_file():
        return ""
    return next((path for path in module_paths(folder) if _is_transformer(folder / path)), "")


def module_paths(folder: Path) -> list[str]:
    """The paths that modules.json names, in order; none where there is no such file.

    Raises:
        ValueError: modules.json is damaged, or names a path out of the folder.
    """
    file = folder / MODULES
    if not file.is_file():
        return []
    try:
        paths = [str(module["path"]) for module in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: it is not a list of modules with a path each ({error!r})") from None
    for path in paths:
        if PurePosixPath(path).is_absolute() or ".." in Path(path).parts:
            raise ValueError(f"{file} names the path {path!r}, which leads out of the folder")
    return paths


def copy_side_files(source: Path, out: Path, model: str = "") -> list[str]:
    """Copy all files of a model's folder but its weights.

    The content is copied, never run, and no file is executable afterwards. Left out are the weights in the model's own
    folder, hidden folders, folders with the same weights in another format (onnx, openvino, coreml, original) or of a
    training (checkpoint-NUMBER), and links that lead out of the folder. The blobs of the Hugging Face cache, which its
    snapshots link to, count as inside.

    Args:
        source: the model's folder.
        out: a folder that exists. Files in it are replaced.
        model: the subfolder of the model's own weights, as `subfolder_of_model` returns it.

    Returns:
        What was left out, by relative path, with the reason where it is not the weights.
    """
    root, own = source.resolve(), Path(model)
    inside = [root]
    if root.parent.name == "snapshots":
        inside.append(root.parent.parent / "blobs")
    modules = {Path(path) for path in module_paths(root)}
    left = []
    for folder, folders, files in os.walk(root):
        here = Path(folder).relative_to(root)
        for name in sorted(folders):
            path = here / name
            if (root / path).is_symlink():
                left.append(f"{path}/ (a linked folder)")
            elif path not in modules and _COPIES.fullmatch(name):
                folders.remove(name)
                left.append(f"{path}/")
        folders.sort()
        for name in sorted(files):
            path = here / name
            target = (root / path).resolve()
            if here == own and name.endswith((*WEIGHTS, _INDEX)):
                left.append(str(path))
            elif not any(target.is_relative_to(place) for place in inside):
                left.append(f"{path} (a link out of the folder)")
            elif not target.is_file():
                left.append(f"{path} (not a regular file)")
            else:
                (out / here).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(target, out / path)
    return left


def _is_transformer(folder: Path) -> bool:
    """Whether a folder holds the config of a model of transformers; those of pooling and the like name no model."""
    try:
        return "model_type" in json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False
