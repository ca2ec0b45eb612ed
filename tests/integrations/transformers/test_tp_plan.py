"""Tensor parallelism by the `tp_plan` of a model: two processes compute, train and save what one does."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from tests.integrations.transformers import tp_plan_runs as runs
from tests.processes import made_once, run_script
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the processes have saved; they run once for all processes of pytest."""
    return made_once(tmp_path_factory, "tp_plan", partial(run_script, runs.__file__))


def load(folder: Path, name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder / name)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", runs.CASES)
def test_two_processes_compute_and_save_what_one_does(folder: Path, name: str) -> None:
    model = load(folder, runs.CASES[name][0])
    alone, results = runs.run(model), [torch.load(folder / f"{rank}.pt")[name] for rank in range(2)]
    for result in results:
        assert_close(result["logits"], alone["logits"], rtol=1e-9, atol=1e-11)
        # transformers weighs experts in float32, whatever the dtype of the model
        close = {"rtol": 1e-4, "atol": 1e-7} if name == "mixtral" else {"rtol": 1e-9, "atol": 1e-11}
        assert_close(result["gradients"], alone["gradients"], **close)
        assert torch.equal(result["tokens"], alone["tokens"])
    saved = load(folder, f"{name} saved")
    assert_close(saved.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_factors_are_sharded(folder: Path) -> None:
    sharded = {name: torch.load(folder / "0.pt")[name]["sharded"] for name in runs.CASES}
    layer, head = "model.layers.0.", {"lm_head.B"}
    attention = {f"{layer}self_attn.{name}_proj.{factor}" for name in "qkvo" for factor in "AB"}
    mlp = {f"{layer}mlp.gate_proj.B", f"{layer}mlp.up_proj.B", f"{layer}mlp.down_proj.A"}
    assert {name for name in sharded["llama"] if name.startswith((layer, "lm_head"))} == attention | mlp | head
    dense = {"model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"}
    assert dense <= sharded["llama"]
    assert sharded["odd head"] == sharded["llama"] - head
    biases = {f"{layer}self_attn.{name}_proj.bias" for name in "qkv"}
    assert {"model.embed_tokens.B", *biases} <= sharded["qwen2"]
    experts = {f"{layer}mlp.experts.{name}" for name in ("gate.B", "up.B", "down.A")}
    assert {name for name in sharded["mixtral"] if name.startswith(f"{layer}mlp")} == experts
    # the head has the factors of the table, under one name
    assert not any(name.startswith("lm_head") for name in sharded["qwen2"])


def test_mistakes(folder: Path) -> None:
    mistakes: dict[str, str] = torch.load(folder / "1.pt")["mistakes"]
    head, style = mistakes["does not fit"], mistakes["style"]
    assert head.startswith("DoesNotFit: lm_head: low_rank(rank=4)")
    assert "2 devices cannot share the axis" in head
    assert "The style 'replicate' in tp_plan" in head
    assert style.startswith("ValueError: model.layers.0.mlp.up_proj: the style 'packed_colwise' is not for a Linear, ")
    assert "but colwise, " in style
    wrong = "the style 'ep_dispatch_experts' is not for a GatedExperts, but moe_tp_experts"
    assert mistakes["experts"].startswith(f"ValueError: model.layers.0.mlp.experts: {wrong}")
    quantized = mistakes["quantized"]
    assert quantized.startswith("TypeError: model.layers.0.mlp.up_proj: Colwise is not for a QuantizedLinear: compress")
    assert "The style 'replicate' in tp_plan" in quantized


def test_older_versions_of_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("einlinear.integrations.transformers.quantizer.find_spec", lambda _: None)
    load(folder, "llama")
    monkeypatch.setattr(PreTrainedModel, "_tp_size", 2)
    with pytest.raises(ImportError, match=r"needs transformers 5\.16 or later, not 5"):
        load(folder, "llama")
