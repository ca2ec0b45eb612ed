"""Side files of a model's folder: tokenizer, processors, templates, modules of a pipeline."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path, PurePosixPath

from einlinear.files import read_json

# of sentence-transformers: the modules of a pipeline and their folders
MODULES = "modules.json"
_CONFIG = "config.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".onnx_data", ".gguf")
# of sharded weights
_INDEX = ".index.json"
# folders with copies of the weights: in another format, or from the training
_COPIES = re.compile(r"onnx|openvino|coreml|original|checkpoint-\d+|__pycache__|\..*")


def subfolder_of_model(folder: Path) -> str:
    """Return the subfolder of the transformer: "" for the folder itself, else the path of a module in modules.json.

    Raises:
        ValueError: modules.json is damaged, or names a path out of the folder.
    """
    if (folder / _CONFIG).is_file():
        return ""
    return next((path for path in module_paths(folder) if _is_transformer(folder / path)), "")


def module_paths(folder: Path) -> list[str]:
    """Return the paths in modules.json, in order; none without that file.

    Raises:
        ValueError: modules.json is damaged, or names a path out of the folder.
    """
    file = folder / MODULES
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


def copy_side_files(source: Path, out: Path, model: str = "") -> list[str]:
    """Copy all files of a model's folder except its weights.

    The content is copied, never run, and no file is executable afterwards. Left out are the weights in the model's own
    folder, hidden folders, folders with copies of the weights (onnx, openvino, coreml, original, checkpoint-NUMBER),
    and links that lead out of the folder. The blobs of the Hugging Face cache, to which its snapshots link, count as
    inside.

    Args:
        source: the model's folder.
        out: a folder that exists. Files in it are replaced.
        model: the subfolder of the model's own weights, as `subfolder_of_model` returns it.

    Returns:
        The relative paths that were left out, with the reason for all but weights.
    """
    root, model_folder = source.resolve(), Path(model)
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
            if place == model_folder and name.endswith((*WEIGHTS, _INDEX)):
                left_out.append(str(path))
            elif not any(target.is_relative_to(parent) for parent in inside):
                left_out.append(f"{path} (a link out of the folder)")
            elif not target.is_file():
                left_out.append(f"{path} (not a regular file)")
            else:
                (out / place).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(target, out / path)
    return left_out


def _is_transformer(folder: Path) -> bool:
    """Return whether a folder holds the config of a transformers model, which names a model type."""
    try:
        return "model_type" in read_json(folder / _CONFIG)
    except (OSError, ValueError, TypeError):
        return False
