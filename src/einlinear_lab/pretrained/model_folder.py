"""Folders of transformers models: loaded, and written again with the compressed model."""

from __future__ import annotations

import glob
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers.utils.hub import cached_file

from einlinear.compression.compression_report import CompressionReport
from einlinear.files import atomic, read_json, write_json
from einlinear_lab.pretrained.side_files import MODULES, WEIGHTS, copy_side_files, module_paths, subfolder_of_model

REPORT = "compression.json"
_ADAPTER = "adapter_config.json"


def load(source: str | Path, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """Load a model, as the class that saved it, and its tokenizer, or None if it has none.

    Args:
        source: a folder that `save_pretrained` or sentence-transformers wrote, or a name on the Hugging Face hub.
        dtype: of the parameters, such as "float32"; "auto": that of the file.
        device: of the model.

    Raises:
        ValueError: there is no model or no such device, or the folder holds an adapter without its model.
    """
    try:
        place = torch.zeros((), device=device).device
    # AssertionError: torch was built without CUDA
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {error}") from None
    # no name on the hub begins like this
    if str(source).startswith((".", "/")) and not Path(source).exists():
        raise ValueError(f"there is no folder {source}")
    if _file(source, _ADAPTER) is not None:
        raise ValueError(
            f"{source} holds an adapter ({_ADAPTER}). Merge it into its model first and save that, with peft: "
            "AutoPeftModel.from_pretrained(...).merge_and_unload().save_pretrained(FOLDER)"
        )
    # code that comes with a model is never run, and transformers does not ask
    arguments = {"subfolder": _subfolder(source), "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(source, **arguments)
        classes = [getattr(transformers, name, None) for name in config.architectures or ()]
        model_class: Any = next(filter(None, classes), transformers.AutoModel)
        model = model_class.from_pretrained(source, dtype=dtype, **arguments).eval().to(place)
    except (OSError, ValueError) as error:
        hint = "" if Path(source).exists() else "; there is no folder of this name either"
        raise ValueError(f"{source} is not a model that transformers can load: {error}{hint}") from None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **arguments)
    # without its files, every class of tokenizer raises another kind of error
    except Exception:
        return model, None
    # or none, and has no words: every text would be the same
    return model, tokenizer if len(tokenizer) > len(tokenizer.all_special_ids) else None


def _file(source: str | Path, name: str) -> Path | None:
    """The path of a file in a model's folder, or of one from the hub; None if the model has no such file."""
    try:
        path = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None
    return None if path is None else Path(path)


def _subfolder(source: str | Path) -> str:
    """The subfolder of a model's config and weights, in a folder or on the hub; see `subfolder_of_model`."""
    modules = _file(source, MODULES)
    if modules is None:
        return ""
    if not Path(source).is_dir():
        for path in module_paths(modules.parent):
            # downloads it beside modules.json, into the hub's cache
            _file(source, f"{path}/config.json")
        _file(source, "config.json")
    return subfolder_of_model(modules.parent)


def _snapshot(source: str | Path) -> Path:
    """The folder of a model; that of a model on the hub is downloaded, without weights."""
    if Path(source).is_dir():
        return Path(source)
    folder = Path(snapshot_download(str(source), ignore_patterns=[f"*{ending}" for ending in WEIGHTS]))
    modules = set(module_paths(folder)) - {subfolder_of_model(folder), ""}
    if modules:
        snapshot_download(str(source), allow_patterns=[f"{path}/*" for path in sorted(modules)])
    return folder


def save(
    model: Any,
    tokenizer: Any,
    report: CompressionReport,
    out: Path,
    source: str | Path | None = None,
    config: Mapping[str, str] | None = None,
) -> list[str]:
    """Write a compressed model, its tokenizer and the report to a folder that `from_pretrained` loads.

    Args:
        model, tokenizer: from `load`; the model is compressed.
        report: of the compression.
        out: a folder that does not exist yet.
        source: what `load` loaded: its other files are copied, see `copy_side_files`.
        config: of the command, by which `finish` recognises its result.

    Returns:
        The files of the source that were left out.

    Raises:
        ValueError: `out` exists.
    """
    if out.exists():
        raise ValueError(f"{out} exists: name a folder that does not")
    left_out: list[str] = []
    with atomic(out) as folder:
        folder.mkdir(parents=True)
        place = folder
        if source is not None:
            root = _snapshot(source)
            subfolder = subfolder_of_model(root)
            place = folder / subfolder
            place.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(place)
        if source is not None:
            # replaces the tokenizer's files by the original ones
            left_out = copy_side_files(root, folder, subfolder)
        model.save_pretrained(place)
        facts = asdict(report)
        content = {"layers": facts["layers"], "skipped": dict(report.skipped), "coverage": facts["coverage"]}
        write_json(folder / REPORT, content if config is None else {**content, "config": dict(config)})
    return left_out


def finish(out: Path, unfinished: Path, config: Mapping[str, str]) -> bool:
    """Remove what killed commands left beside `out`. The caller holds the lock.

    Args:
        out: the folder to write.
        unfinished: the resume cache of an interrupted command.
        config: of the command.

    Returns:
        Whether the same command had written all of `out`, and was killed before it removed `unfinished`.
    """
    for left in out.parent.glob(f".{glob.escape(out.name)}.*"):
        # scratch folders of `save`
        if left.suffix[1:].isdigit():
            shutil.rmtree(left, ignore_errors=True)
    try:
        was_complete = unfinished.exists() and read_json(out / REPORT).get("config") == dict(config)
    except (OSError, ValueError, AttributeError):
        return False
    if was_complete:
        shutil.rmtree(unfinished)
    return was_complete
