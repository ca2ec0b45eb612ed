"""Texts that calibrate a model: lines, rows and chats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lab.data.samples import needs

pytestmark = needs("transformers")

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
CHAT = [{"role": "user", "content": "she read"}, {"role": "assistant", "content": "the sea"}]


def tokenizer(template: str | None = TEMPLATE) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[BOS]", "[EOS]", "[UNK]", "she", "read", "the", "sea", "<", ">"])}
    words |= {"user": 9, "assistant": 10}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 0)])
    found = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]")
    found.chat_template = template
    return found


def read(path: Path, rows: list[dict[str, Any]], template: str | None = TEMPLATE) -> Any:
    from einlinear_lab.pretrained.documents import read_documents

    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_documents(path, tokenizer(template))


def texts(documents: Any) -> list[str]:
    return [documents.text(i) for i in range(documents.count)]


def test_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    chats = read(path, [{"id": 7, "prompt": "not one of a pair", "messages": CHAT}] * 2)
    assert texts(chats) == ["<user>she read<assistant>the sea"] * 2, "and no prompt for an answer"
    assert chats.origin == f"2 rows with messages from {path}, by the tokenizer's chat template"
    plain = read(path, [{"text": "she read", "title": "x"}, {"text": " "}, {"text": "the sea"}])
    assert texts(plain) == ["she read", "the sea"]
    assert plain.origin == f"2 rows with text from {path}"
    assert texts(read(path, [{"prompt": "she read ", "completion": "the sea"}])) == ["she read the sea"]
    assert texts(read(path, [{"prompt": CHAT[:1], "completion": CHAT[1:]}])) == ["<user>she read<assistant>the sea"]
    path = tmp_path / "rows.txt"
    assert texts(read(path, [{"text": "she"}])) == ['{"text": "she"}'], "the name says that this is plain text"


@needs("pyarrow")
def test_chats_in_parquet(tmp_path: Path) -> None:
    import pyarrow.parquet

    from einlinear_lab.pretrained.documents import read_documents

    call = {"role": "assistant", "content": "read", "tool_calls": [{"name": "f"}]}
    table = pyarrow.Table.from_pylist([{"messages": CHAT}, {"messages": [*CHAT, call]}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    seen = "{% for m in messages %}{{ m.keys() | list | length }}{% endfor %}"
    assert texts(read_documents(tmp_path / "a.parquet", tokenizer(seen))) == ["22", "223"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"text": "x"}, {"conversations": [], "id": 3}],
            "line 2 of .* has conversations, id; known are text, messages",
        ),
        ([{}], "line 1 of .* has no values; known are"),
        ([{"text": "x", "messages": CHAT}], "line 1 of .* has text as well as messages"),
        ([{"text": "x"}, {"messages": CHAT}], "line 1 of .* has text, but line 2 of .* has messages"),
        ([{"prompt": "x"}], "line 1 of .* has prompt; known are .*prompt and completion"),
        ([{"text": ["x"]}], "line 1 of .*: text must be a text, not list"),
        ([{"messages": "x"}], "line 1 of .*: messages must be a list of messages, not str"),
        ([{"messages": []}], "line 1 of .*: messages is empty"),
        ([{"messages": [{"from": "human", "value": "x"}]}], "line 1 of .*: message 1 of messages must be"),
        ([{"prompt": "x", "completion": CHAT}], "prompt and completion must both be"),
        ([{"text": ""}], "holds no text: text is empty in all of its rows"),
        ([], "holds no rows"),
    ],
)
def test_rows_that_are_refused(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "rows.jsonl", rows)


def test_chats_need_a_template(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the model's tokenizer has no chat template .* set tokenizer\.chat_template"):
        read(tmp_path / "rows.jsonl", [{"messages": CHAT}], template=None)
    assert read(tmp_path / "rows.jsonl", [{"text": "she"}], template=None).count == 1
    picky = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"line 1 of .* does not fit the tokenizer's chat template: roles must"):
        read(tmp_path / "rows.jsonl", [{"messages": CHAT}], picky).text(0)


def test_what_a_model_gets(tmp_path: Path) -> None:
    """Chats as their template renders them; texts as the tokenizer marks beginning and end."""
    from tests.integrations.transformers.models import MODELS

    from einlinear_lab.pretrained.documents import text_batches

    path, known = tmp_path / "rows.jsonl", tokenizer()
    chat = [7, 9, 8, 3, 4, 7, 10, 8, 5, 6]
    (batch,) = text_batches(MODELS["gpt2"](), known, read(path, [{"messages": CHAT}] * 3), 2, 10)
    assert batch["input_ids"].tolist() == [chat, chat]
    (batch,) = text_batches(MODELS["gpt2"](), known, read(path, [{"text": "the sea"}] * 3), 9, 6)
    assert batch["input_ids"].tolist() == [[0, 5, 6, 1, 0, 5], [6, 1, 0, 5, 6, 1]] or batch["input_ids"].tolist() == [
        [6, 1, 0, 5, 6, 1],
        [0, 5, 6, 1, 0, 5],
    ]
    batches = text_batches(MODELS["bert"](), known, read(path, [{"messages": CHAT}, {"messages": CHAT[:1]}]), 9, 20)
    assert sorted(int(mask.sum()) for batch in batches for mask in batch["attention_mask"]) == [5, 10]
    assert known.pad_token is None, "the tokenizer that is saved is the model's"
    assert torch.equal(batches[0]["input_ids"].max(), torch.tensor(10))
