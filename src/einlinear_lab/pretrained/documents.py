"""Calibration texts: files of plain text, rows or chats, and batches of their tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from einlinear_lab.data.rows import format_of, open_text, read_rows

_SHAPES = {"text": ("text",), "messages": ("messages",), "prompt and completion": ("prompt", "completion")}
_ALLOWED = "text, messages (a chat), or prompt and completion"
# The types of the values of these keys; all others may have both.
_TYPES: dict[str, tuple[type, ...]] = {"text": (str,), "messages": (list,)}
_NOUNS: dict[type, str] = {str: "a text", list: "a list of messages"}


@dataclass(frozen=True)
class Documents:
    """The texts of a file: `kind` is "lines" or the keys of the rows, and `text` returns the text of an index."""

    file: Path
    kind: str
    count: int
    text: Callable[[int], str]
    is_chat: bool = False

    @property
    def origin(self) -> str:
        if self.kind == "lines":
            return f"{self.count:,} lines of text from {self.file}"
        how = ", by the tokenizer's chat template" if self.is_chat else ""
        return f"{self.count:,} rows with {self.kind} from {self.file}{how}"


def read_documents(file: Path, tokenizer: Any) -> Documents:
    """Read the texts of a file.

    Files ending in .jsonl, .ndjson, .json, .csv, .tsv and .parquet, or these with .gz, hold rows; any other file is
    plain text with one text per line. All rows have the same one of

    * `text`: a text;
    * `messages`: a chat, a list of {"role": ..., "content": ...} that the tokenizer's chat template renders, without a
      prompt for a further answer; the template gets `tools` as well;
    * `prompt` and `completion`: two texts, which are joined, or two lists of messages.
    """
    if format_of(file) is None:
        with open_text(file) as opened:
            lines = [line.strip() for line in opened.read().splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{file} holds no text")
        return Documents(file, "lines", len(lines), lines.__getitem__)
    rows = list(read_rows(file))
    if not rows:
        raise ValueError(f"{file} holds no rows")
    # Each with the place of its first row.
    kinds: dict[str, str] = {}
    for where, row in rows:
        kinds.setdefault(_shape(where, row), where)
    if len(kinds) > 1:
        (first, where), (second, elsewhere) = list(kinds.items())[:2]
        raise ValueError(f"{where} has {first}, but {elsewhere} has {second}: give one kind of rows in a file")
    (kind,) = kinds
    keys = _SHAPES[kind]
    chats = [_is_chat(where, row, keys) for where, row in rows]
    if any(chats) and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"{file} holds chats, but the model's tokenizer has no chat template that makes them a text: set "
            "tokenizer.chat_template and save the tokenizer with the model, or give rows with text"
        )
    if any(chats) != all(chats):
        raise ValueError(f"{file} holds chats and plain texts: give one kind of rows in a file")
    kept = [(where, row) for where, row in rows if chats[0] or any(row[key].strip() for key in keys)]
    if not kept:
        raise ValueError(f"{file} holds no text: {kind} is empty in all of its rows")

    def text(i: int) -> str:
        where, row = kept[i]
        return _chat(keys, tokenizer, where, row) if chats[0] else "".join(row[key] for key in keys)

    return Documents(file, kind, len(kept), text, chats[0])


def _shape(where: str, row: Mapping[str, Any]) -> str:
    shapes = [shape for shape, keys in _SHAPES.items() if all(row.get(key) is not None for key in keys)]
    if len(shapes) > 1:
        raise ValueError(f"{where} has {' as well as '.join(shapes)}, so it is not clear which to take: keep one")
    if not shapes:
        raise ValueError(f"{where} has {', '.join(map(str, row)) or 'no values'}; known are {_ALLOWED}")
    return shapes[0]


def _is_chat(where: str, row: Mapping[str, Any], keys: tuple[str, ...]) -> bool:
    """Return whether a row holds lists of messages. Raise ValueError if it holds neither these nor texts."""
    for key in keys:
        value, allowed = row[key], _TYPES.get(key, (str, list))
        if not isinstance(value, allowed):
            expected = " or ".join(_NOUNS[kind] for kind in allowed)
            raise ValueError(f"{where}: {key} must be {expected}, not {type(value).__name__}")
        if value == []:
            raise ValueError(f"{where}: {key} is empty")
        for number, message in enumerate(value if isinstance(value, list) else (), start=1):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise ValueError(f'{where}: message {number} of {key} must be {{"role": ..., "content": ...}}')
    if len({type(row[key]) for key in keys}) > 1:
        raise ValueError(f"{where}: prompt and completion must both be texts, or both lists of messages")
    return isinstance(row[keys[0]], list)


def _chat(keys: tuple[str, ...], tokenizer: Any, where: str, row: Mapping[str, Any]) -> str:
    """Render the messages of a row. In Parquet every message has the keys of all messages, most of them None."""
    messages = [
        {name: value for name, value in message.items() if value is not None} for key in keys for message in row[key]
    ]
    try:
        return str(tokenizer.apply_chat_template(messages, tools=row.get("tools"), tokenize=False))
    # A template may raise anything.
    except Exception as error:
        raise ValueError(f"{where} does not fit the tokenizer's chat template: {error}") from None


def text_batches(
    model: Any, tokenizer: Any, documents: Documents, samples: int = 256, tokens: int = 256, batch_size: int = 16
) -> list[dict[str, Tensor]]:
    """Return at most `samples` texts of at most `tokens`, in batches on the CPU, for the arguments of a model.

    A model that generates text gets pieces of equal length of the concatenated texts, each ended by the end-of-text
    token unless it is a chat. Other models get texts of similar length together, padded. The order has a fixed seed.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} takes pairs of texts, which a text file does not have: call el.compress in Python "
            "with batches of your own"
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
        starts = _spread(torch.arange(0, len(ids) - tokens + 1, tokens), samples)
        pieces = torch.stack([ids[start : start + tokens] for start in starts[_shuffled(len(starts))]])
        return [{"input_ids": part} for part in pieces.split(batch_size)]
    chosen = [documents.text(int(i)) for i in _spread(torch.arange(documents.count), samples)]
    # Texts of similar length together: less padding.
    chosen.sort(key=len)
    if tokenizer.pad_token is None:
        # A copy: the tokenizer is saved with the model.
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    parts = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
    arguments = {"padding": True, "truncation": True, "max_length": tokens, "add_special_tokens": not documents.is_chat}
    return [dict(tokenizer(parts[i], return_tensors="pt", **arguments)) for i in _shuffled(len(parts))]


def _token_ids(tokenizer: Any, documents: Documents, enough: int) -> list[int]:
    if documents.kind == "lines":
        text = "\n".join(map(documents.text, range(documents.count)))
        return list(tokenizer(text, verbose=False)["input_ids"])
    ids: list[int] = []
    for i in _shuffled(documents.count):
        ids += tokenizer(documents.text(i), verbose=False, add_special_tokens=not documents.is_chat)["input_ids"]
        end = tokenizer.eos_token_id
        if end is not None and not documents.is_chat and ids[-1:] != [end]:
            ids.append(end)
        if len(ids) >= enough:
            break
    return ids


def _shuffled(count: int) -> list[int]:
    return list(map(int, torch.randperm(count, generator=torch.Generator().manual_seed(0))))


def _spread(items: Tensor, count: int) -> Tensor:
    """Return at most `count` of the items, evenly spread."""
    return items[torch.linspace(0, len(items) - 1, min(count, len(items))).round().long()]
