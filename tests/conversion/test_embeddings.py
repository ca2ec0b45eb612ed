"""Embeddings are converted when asked for, alone or with the head that shares their weight, and saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import einlinear as el


def language_model(tied: bool) -> Any:
    sizes: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": tied}
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(24).reshape(2, 12)).logits  # type: ignore[no-any-return]


TOGETHER = {"*embed_tokens": "low_rank(rank=32)", "lm_head": "low_rank(rank=32)"}


def test_projection_at_full_rank_keeps_the_function() -> None:
    model = language_model(tied=False)
    before = logits(model)
    report = el.convert(model, "low_rank(rank=32)", layers="lm_head", embeddings="*", weights="project")
    assert [c.before for c in report.converted] == ["Embedding 96 x 32", "Linear 32 -> 96"]
    assert [c.macs for c in report.converted] == [0, 32 * (32 + 96)]
    torch.testing.assert_close(logits(model), before)
    el.densify(model)
    assert type(model.model.embed_tokens) is nn.Embedding
    torch.testing.assert_close(logits(model), before)


@pytest.mark.parametrize("tied", [False, True])
def test_new_tables_keep_the_size_of_entries(tied: bool) -> None:
    model = language_model(tied)
    before = model.model.embed_tokens.weight.detach().std()
    el.convert(model, "btt(rank=4)", layers="lm_head", embeddings="model.*")
    after = model.model.embed_tokens.dense_weight().detach().std()
    assert 0.7 < float(after / before) < 1.4


def test_nothing_is_converted_unasked() -> None:
    model = language_model(tied=False)
    el.convert(model, "low_rank(rank=4)")
    assert type(model.model.embed_tokens) is nn.Embedding


def test_a_tied_head_shares_the_factors(tmp_path: Path) -> None:
    model = language_model(tied=True)
    before = logits(model)
    el.convert(model, TOGETHER, embeddings="*", weights="project")
    torch.testing.assert_close(logits(model), before)
    assert model.lm_head.A is model.model.embed_tokens.A
    names = [name for group in el.param_groups(model, 1e-3, base=None) for name in group["param_names"]]
    assert len(names) == len(set(names)) == len(list(model.parameters()))
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.A is loaded.model.embed_tokens.A
    assert torch.equal(logits(loaded), logits(model))
    el.densify(loaded)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_folders_with_structured_embeddings(tmp_path: Path) -> None:
    model = language_model(tied=False)
    el.convert(model, "btt(rank=2)", embeddings="*", exclude="lm_head")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded.model.embed_tokens, el.Embedding)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "0", nn.Embedding(16, 8, max_norm=1.0)), "has max_norm, scale_grad_by_freq or sparse"),
        (lambda m: setattr(m, "0", type("Scaled", (nn.Embedding,), {})(16, 8)), "is a Scaled, and no plain nn.Embed"),
        (lambda m: m[0].register_forward_hook(lambda *_: None), "has hooks, which would be lost"),
    ],
)
def test_tables_that_compute_more_are_left(change: Any, reason: str) -> None:
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8))
    change(model)
    report = el.convert(model, "low_rank(rank=2)", embeddings="0")
    assert len(report.skipped) == 1
    assert report.skipped[0][1].startswith(reason)


def test_mistakes_leave_the_model_unchanged() -> None:
    model = language_model(tied=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="embeddings: 'wte' matches no embedding; the nearest are model"):
        el.convert(model, "low_rank(rank=2)", embeddings="wte")
    with pytest.raises(
        ValueError, match=r"is tied to model\.embed_tokens, which is not converted to the same structure"
    ):
        el.convert(model, "low_rank(rank=2)", layers="lm_head")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
