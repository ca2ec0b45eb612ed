"""Models of transformers in folders: read, run on text, and written again, compressed."""

from __future__ import annotations

import copy
import glob
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from einlinear.compression.compression_report import CompressionReport
from einlinear.files import read_json, rename, write_json
from einlinear_lab.pretrained.documents import Documents
from einlinear_lab.pretrained.side_files import MODULES, WEIGHTS, copy_side_files, module_paths, subfolder_of_model

REPORT = "compression.json"
_ADAPTER = "adapter_config.json"


def load(source: str | Path, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """A model, of the class that it was saved from, and its tokenizer, or None if it has none.

    Args:
        source: a folder that `save_pretrained` or sentence-transformers wrote, or a name on the Hugging Face hub.
        dtype: of the parameters, such as "float32"; "auto" is that of the file.
        device: that the model is moved to.

    Raises:
        ValueError: there is no model, or no such device; says what transformers or torch says. Or the folder holds an
            adapter, which is no model of its own.
    """
    try:
        place = torch.zeros((), device=device).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise ValueError(f"device {device!r} cannot be used: {error}") from None
    if str(source).startswith((".", "/")) and not Path(source).exists():  # no name on the hub begins so
        raise ValueError(f"there is no folder {source}")
    if _file(source, _ADAPTER) is not None:
        raise ValueError(
            f"{source} holds an adapter ({_ADAPTER}). Merge it into its model first and save that, with peft: "
            "AutoPeftModel.from_pretrained(...).merge_and_unload().save_pretrained(FOLDER)"
        )
    # Code that comes with a model is never run, nor does transformers ask whether it may be.
    options = {"subfolder": _subfolder(source), "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(source, **options)
        named = [getattr(transformers, name, None) for name in config.architectures or ()]
        kind: Any = next((found for found in named if found is not None), transformers.AutoModel)
        model = kind.from_pretrained(source, dtype=dtype, **options).eval().to(place)
    except (OSError, ValueError) as error:
        here = "" if Path(source).exists() else "; there is no folder of this name either"
        raise ValueError(f"{source} is not a model that transformers can load: {error}{here}") from None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    except Exception:  # where its files are missing, every class of tokenizer raises another kind of error
        return model, None
    # Some classes raise none, and know no words: every text would be the same.
    return model, tokenizer if len(tokenizer) > len(tokenizer.all_special_ids) else None


def _file(source: str | Path, name: str) -> Path | None:
    """A file of a model's folder, or of the hub; None if the model has no such file."""
    try:
        found = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None
    return None if found is None else Path(found)


def _subfolder(source: str | Path) -> str:
    """Where in a folder, or on the hub, the model's config and weights are; see `subfolder_of_model`."""
    modules = _file(source, MODULES)
    if modules is None:
        return ""
    if not Path(source).is_dir():
        for path in module_paths(modules.parent):
            _file(source, f"{path}/config.json")  # into the folder of the cache that modules.json is in
        _file(source, "config.json")
    return subfolder_of_model(modules.parent)


def _snapshot(source: str | Path) -> Path:
    """The folder of a model; one of the hub is downloaded, without its weights."""
    if Path(source).is_dir():
        return Path(source)
    folder = Path(snapshot_download(str(source), ignore_patterns=[f"*{ending}" for ending in WEIGHTS]))
    modules = set(module_paths(folder)) - {subfolder_of_model(folder), ""}
    if modules:
        snapshot_download(str(source), allow_patterns=[f"{path}/*" for path in sorted(modules)])
    return folder


def text_batches(
    model: Any, tokenizer: Any, documents: Documents, samples: int = 256, tokens: int = 256, batch_size: int = 16
) -> list[dict[str, Tensor]]:
    """Calibration data from texts, as a model takes them.

    A model that generates text gets the text cut into pieces of equal length, taken from all over it; another gets its
    lines or rows, padded, those of like length together. The order is random, and always the same. For a model that
    generates text, rows follow each other in that order, each ended by the tokenizer's end of a text unless it is a
    chat, whose template says how it ends.

    Args:
        model, tokenizer: from `load`.
        documents: from `read_documents`.
        samples: pieces, lines or rows, at most.
        tokens: of each, at most.
        batch_size: samples in a batch.

    Returns:
        Batches for the keyword arguments of the model, on the CPU.

    Raises:
        ValueError: no tokenizer, an encoder with a decoder, which takes pairs of texts, or a row that the template of
            chats refuses.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} takes pairs of texts, which a text file has not: call el.compress in Python, with "
            "batches of your own"
        )
    if tokenizer is None:
        raise ValueError("the model comes without a tokenizer, so text cannot calibrate it")
    longest = (getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
    tokens = min([tokens, *filter(None, longest)])
    if model.can_generate():
        ids = torch.tensor(_token_ids(tokenizer, documents, samples * tokens))
        if not len(ids):
            raise ValueError(f"{documents.file}: the tokenizer makes no tokens of its text")
        tokens = min(tokens, len(ids))
        starts = torch.arange(0, len(ids) - tokens + 1, tokens)
        starts = _spread(starts, samples)[torch.randperm(min(samples, len(starts)), generator=_generator())]
        pieces = torch.stack([ids[start : start + tokens] for start in starts])
        return [{"input_ids": part} for part in pieces.split(batch_size)]
    chosen = [documents.text(int(i)) for i in _spread(torch.arange(documents.count), samples)]
    chosen.sort(key=len)  # lines of like length together: less padding
    if tokenizer.pad_token is None:
        tokenizer = copy.deepcopy(tokenizer)  # what is saved with the model stays as it is
        tokenizer.pad_token = tokenizer.eos_token
    parts = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
    parts = [parts[i] for i in torch.randperm(len(parts), generator=_generator()).tolist()]
    options = {"padding": True, "truncation": True, "max_length": tokens, "add_special_tokens": not documents.is_chat}
    return [dict(tokenizer(part, return_tensors="pt", **options)) for part in parts]


def _token_ids(tokenizer: Any, documents: Documents, enough: int) -> list[int]:
    """The tokens of a text; of rows, of as many as make enough tokens."""
    if documents.kind == "lines":
        text = "\n".join(map(documents.text, range(documents.count)))
        return list(tokenizer(text, verbose=False)["input_ids"])
    ids: list[int] = []
    for i in torch.randperm(documents.count, generator=_generator()).tolist():
        text = documents.text(i)
        ids += tokenizer(text, verbose=False, add_special_tokens=not documents.is_chat)["input_ids"]
        end = tokenizer.eos_token_id
        if end is not None and not documents.is_chat and ids[-1:] != [end]:
            ids.append(end)
        if len(ids) >= enough:
            break
    return ids


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _spread(items: Tensor, count: int) -> Tensor:
    """At most so many of the items, evenly spread."""
    return items[torch.linspace(0, len(items) - 1, min(count, len(items))).round().long()]


@contextmanager
def written(out: Path) -> Iterator[Path]:
    """A folder to write into that has its name once all is written.

    Raises:
        ValueError: something of that name is there.
    """
    if out.exists():
        raise ValueError(f"{out} exists: name a folder that does not")
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    scratch.mkdir(parents=True)
    try:
        yield scratch
        rename(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def save(
    model: nn.Module,
    tokenizer: Any,
    report: CompressionReport,
    out: Path,
    source: str | Path | None = None,
    options: Mapping[str, str] | None = None,
) -> list[str]:
    """Write a compressed model, its tokenizer and what was done, so that `from_pretrained` loads it.

    Args:
        model, tokenizer: from `load`; the model is compressed.
        report: of the compression.
        out: a folder that is not there yet.
        source: what was loaded: all of its other files are kept, see `copy_side_files`.
        options: of the command, which are noted down, so that `finish` knows its own.

    Returns:
        What of the source was left out.

    Raises:
        ValueError: something of that name is there.
    """
    saved: Any = model
    left: list[str] = []
    with written(out) as folder:
        place = folder
        if source is not None:
            root = _snapshot(source)
            subfolder = subfolder_of_model(root)
            place = folder / subfolder
            place.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(place)
        if source is not None:
            left = copy_side_files(root, folder, subfolder)  # the tokenizer's files as they were, if they are there
        saved.save_pretrained(place)
        layers = [asdict(layer) for layer in report.layers]
        coverage = None if report.coverage is None else asdict(report.coverage)
        noted = {"layers": layers, "skipped": dict(report.skipped), "coverage": coverage}
        write_json(folder / REPORT, noted if options is None else {**noted, "options": dict(options)})
    return left


def finish(out: Path, unfinished: Path, options: Mapping[str, str]) -> bool:
    """Remove what commands that were killed left beside `out`. Nobody else may be at work there.

    Args:
        out: the folder that was to be written.
        unfinished: what is kept for an interrupted command to go on from.
        options: of the command.

    Returns:
        Whether the same command had written all of `out`, and was killed before it removed `unfinished`.
    """
    for left in out.parent.glob(f".{glob.escape(out.name)}.*"):
        if left.suffix[1:].isdigit():  # as of `written`
            shutil.rmtree(left, ignore_errors=True)
    try:
        was_complete = unfinished.exists() and read_json(out / REPORT).get("options") == dict(options)
    except (OSError, ValueError, AttributeError):
        return False
    if was_complete:
        shutil.rmtree(unfinished)
    return was_complete
