"""docs/results/models.md says what the loop finds, and lists every kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.zoo import table
from tests.zoo.kinds import KINDS, inputs_of, make
from tests.zoo.loop import NOTHING, Trial, generate, loss_of, run
from torch import nn

import einlinear as el

# The kinds that are tried in every test run; `make zoo` tries all.
SAMPLE = """
    Llama; Llama, tied; Mistral; Qwen2; Qwen3; Gemma 2; Gemma 3; Phi-3; Falcon; MPT; BLOOM; OPT; GPT-NeoX; GPT-2; T5;
    T5, gated; BART; Whisper; CLIP; SigLIP; ViT; DINOv2; Swin; BERT; RoBERTa; ModernBERT; DeBERTa-v2; Mamba; Mamba-2;
    Mixtral; Qwen2-MoE; Qwen3-MoE; LLaVA; WavLM; SeamlessM4T; Electra; ResNet; Phimoe; Rwkv; EnCodec; PatchTST;
    Transformer encoder; Transformer; Attention; LSTM tagger; Convolutional net
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # transformers warns of kernels that are not installed, and of its own ways
def test_a_sample_is_as_the_page_says(tmp_path: Path) -> None:
    names = [name.strip() for name in SAMPLE.split(";")]
    trials = run([KINDS[name] for name in names], tmp_path)
    assert table.problems(trials) == []
    page = table.rows_of_page()
    assert {trial.kind.name: table.row(trial) for trial in trials} == {name: page[name] for name in names}


def test_the_page_lists_every_kind_and_every_note() -> None:
    rows = table.rows_of_page()
    assert list(rows) == [kind.name for area in table.AREAS for kind in KINDS.values() if kind.area == area]
    assert not [row for row in rows.values() if "**no**" in row]
    failures = {(name, step) for name, row in rows.items() for step in failed(row)}
    assert failures == set(table.EXPECTED)
    text = table.PAGE.read_text(encoding="utf-8")
    for number, note in enumerate(table.notes(), 1):
        assert f"{number}. {note}\n" in text
        assert any(f"<sup>{number}</sup>" in row for row in rows.values())


def failed(row: str) -> list[str]:
    cells = row.strip("| ").split(" | ")[-len(table.COLUMNS) :]
    return [step for step, cell in zip(table.COLUMNS, cells, strict=True) if cell.startswith("no")]


def trial(name: str, skipped: tuple[tuple[str, str], ...] = (), **cells: str) -> Trial:
    empty = dict.fromkeys(table.COLUMNS, "")
    return Trial(KINDS[name], Path(), nn.Identity(), nn.Identity(), 3, skipped, cells=empty | cells)


def test_what_is_not_expected_is_a_problem() -> None:
    """A failure without a note or for another reason, a note without a failure, a dense layer without a note."""
    assert table.problems([trial("Llama")]) == []
    (found,) = table.problems([trial("Llama", generate="other tokens without a cache")])
    assert found == "Llama: generate fails: other tokens without a cache"
    _, found = table.problems([trial("ResNet", compress="out of memory", train="the loss does not fall")])
    assert found == "ResNet: compress fails: out of memory"
    (found,) = table.problems([trial("ResNet")])
    assert "ResNet: compress works now" in found
    (found,) = table.problems([trial("Llama", (("lm_head", "its weight is tied to x"), ("other", "no idea")))])
    assert found == "Llama: other stays dense, and there is no note for it: no idea"
    assert "**no**: out of memory" in table.row(trial("Llama", compress="out of memory"))


def test_what_transformers_cannot_do_with_a_dense_model(tmp_path: Path) -> None:
    """The notes that blame it are right: Rwkv, as transformers makes it."""
    model, inputs = make(KINDS["Rwkv"]), inputs_of(KINDS["Rwkv"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(model, inputs).backward()
    dense = trial("Rwkv")
    dense.model = model
    assert generate(dense) == "other tokens without a cache"


def test_the_loop_notes_what_goes_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If layers are made dense with another weight, one step fails, and no other."""
    original = el.Linear.to_dense

    def doubled(layer: el.Linear) -> nn.Linear:
        dense = original(layer)
        with torch.no_grad():
            dense.weight.mul_(2)
        return dense

    monkeypatch.setattr(el.Linear, "to_dense", doubled)
    (found,) = run([KINDS["LSTM tagger"]], tmp_path)
    assert found.cells.pop("densify").startswith("outputs differ by")
    assert set(found.cells.values()) == {"", NOTHING}
