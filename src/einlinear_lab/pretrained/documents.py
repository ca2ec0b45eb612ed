"""Texts that calibrate a model: from a file of text, of rows or of chats to what its tokenizer takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from einlinear_lab.data.rows import format_of, open_text, read_rows

_SHAPES = {"text": ("text",), "messages": ("messages",), "prompt and completion": ("prompt", "completion")}
_RIGHT = {"text": "a text", "messages": "a list of messages"}
_KNOWN = "text, messages (a chat), or prompt and completion"


@dataclass(frozen=True)
class Documents:
    """The texts of a file.

    Attributes:
        file: where they came from.
        kind: "lines" of a text, or the keys that its rows are read by: "text", "messages", "prompt and completion".
        count: how many there are.
        text: the one of a number, rendered by the model's chat template if it is a chat.
    """

    file: Path
    kind: str
    count: int
    text: Callable[[int], str]
    is_chat: bool = False

    @property
    def origin(self) -> str:
        """What was read, in a few words."""
        if self.kind == "lines":
            return f"{self.count:,} lines of text from {self.file}"
        how = ", by the tokenizer's chat template" if self.is_chat else ""
        return f"{self.count:,} rows with {self.kind} from {self.file}{how}"


def read_documents(file: Path, tokenizer: Any) -> Documents:
    """Read the texts of a file.

    The ending of its name decides: .jsonl, .ndjson, .json, .csv, .tsv and .parquet hold rows; any other file is plain
    text, each line of which is one. Before .gz the same endings count. All rows have the same one of

    * `text`: a text;
    * `messages`: a chat, a list of {"role": ..., "content": ...} that becomes text by the tokenizer's chat template,
      without a prompt for a further answer; `tools` beside it are passed on;
    * `prompt` and `completion`: two texts, one after the other, or two lists of messages.

    Other values beside them mean nothing.

    Args:
        file: to read.
        tokenizer: of the model, for its chat template.

    Raises:
        ValueError: a file that is damaged or holds no text, a row that is none of these, or chats for a tokenizer
            without a template; the message names file and line.
        OSError: the file cannot be read.
        ModuleNotFoundError: a Parquet file, and pyarrow is not installed.
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
    kinds: dict[str, str] = {}  # each with the place where it is first
    for where, row in rows:
        kinds.setdefault(_shape(where, row), where)
    if len(kinds) > 1:
        (first, where), (other, there) = list(kinds.items())[:2]
        raise ValueError(f"{where} has {first}, but {there} has {other}: give one kind of rows in a file")
    (kind,) = kinds
    chats = [_is_chat(where, row, kind) for where, row in rows]
    if any(chats) and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"{file} holds chats, but the model's tokenizer has no chat template that makes them a text: set "
            "tokenizer.chat_template and save the tokenizer with the model, or give rows with text"
        )
    if any(chats) != all(chats):
        raise ValueError(f"{file} holds chats and plain texts: give one kind of rows in a file")
    kept = [i for i, (_, row) in enumerate(rows) if chats[i] or any(row[key].strip() for key in _SHAPES[kind])]
    if not kept:
        raise ValueError(f"{file} holds no text: {kind} is empty in all of its rows")
    render = partial(_chat, _SHAPES[kind], tokenizer) if chats[0] else partial(_plain, _SHAPES[kind])
    return Documents(file, kind, len(kept), lambda i: render(*rows[kept[i]]), chats[0])


def _shape(where: str, row: Mapping[str, Any]) -> str:
    """Which keys a row is read by."""
    found = [shape for shape, keys in _SHAPES.items() if all(row.get(key) is not None for key in keys)]
    if len(found) > 1:
        raise ValueError(f"{where} has {' as well as '.join(found)}, so it is not clear which to take: keep one")
    if not found:
        raise ValueError(f"{where} has {', '.join(map(str, row)) or 'no values'}; known are {_KNOWN}")
    return found[0]


def _is_chat(where: str, row: Mapping[str, Any], kind: str) -> bool:
    """Whether a row holds lists of messages. Raises ValueError if it holds neither these nor texts."""
    chats = []
    for key in _SHAPES[kind]:
        value = row[key]
        chats.append(isinstance(value, list))
        if key == "text" or not chats[-1]:
            if key == "messages" or not isinstance(value, str):
                right = _RIGHT.get(key, "a text or a list of messages")
                raise ValueError(f"{where}: {key} must be {right}, not {type(value).__name__}")
        elif not value:
            raise ValueError(f"{where}: {key} is empty")
        else:
            for number, message in enumerate(value, start=1):
                if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                    raise ValueError(f'{where}: message {number} of {key} must be {{"role": ..., "content": ...}}')
    if len({*chats}) > 1:
        raise ValueError(f"{where}: prompt and completion must both be texts, or both lists of messages")
    return chats[0]


def _plain(keys: tuple[str, ...], _: str, row: Mapping[str, Any]) -> str:
    return "".join(row[key] for key in keys)


def _chat(keys: tuple[str, ...], tokenizer: Any, where: str, row: Mapping[str, Any]) -> str:
    """The messages of a row as one text. In Parquet every message has the keys of all, most of them None."""
    messages = [
        {name: value for name, value in message.items() if value is not None} for key in keys for message in row[key]
    ]
    try:
        return str(tokenizer.apply_chat_template(messages, tools=row.get("tools"), tokenize=False))
    except Exception as error:  # a template raises what it likes
        raise ValueError(f"{where} does not fit the tokenizer's chat template: {error}") from None
