"""`fuse` on models of transformers: they run fused, compute the same, and can be saved, copied and tuned."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.fusion.blocks import assert_equal, attributes, converted, step
from tests.zoo.kinds import KINDS, make
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import einlinear as el
from einlinear.integrations import peft as lora

# by the names in tests/zoo: up, gate and down, the activation, and the number of blocks
MODELS: dict[str, tuple[str, str | None, str, str, int]] = {
    "Llama": ("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj", "silu", 2),
    "Mistral": ("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj", "silu", 2),
    "Qwen2": ("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj", "silu", 2),
    "Gemma": ("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj", "gelu_tanh", 2),
    "GPT-2": ("mlp.c_fc", None, "mlp.c_proj", "gelu_tanh", 2),
    "GPT-NeoX": ("mlp.dense_h_to_4h", None, "mlp.dense_4h_to_h", "gelu", 2),
    "Phi": ("mlp.fc1", None, "mlp.fc2", "gelu_tanh", 2),
    "OPT": ("fc1", None, "fc2", "relu", 2),
    "Nemotron": ("mlp.up_proj", None, "mlp.down_proj", "relu_squared", 2),
    "MPT": ("ffn.up_proj", None, "ffn.down_proj", "gelu", 2),
    "BERT": ("intermediate.dense", None, "output.dense", "gelu", 2),
    "ViT": ("mlp.fc1", None, "mlp.fc2", "gelu", 2),
    "CLIP": ("mlp.fc1", None, "mlp.fc2", "quick_gelu", 4),
    "BART": ("fc1", None, "fc2", "gelu", 4),
    "T5": ("DenseReluDense.wi", None, "DenseReluDense.wo", "relu", 4),
    "T5, gated": ("DenseReluDense.wi_1", "DenseReluDense.wi_0", "DenseReluDense.wo", "gelu_tanh", 4),
    "Transformer encoder": ("linear1", None, "linear2", "relu", 2),
}


SPECS = ("btt(rank=2)", "low_rank(rank=3)", "monarch(blocks=4)", "dyad")


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_the_same(name: str, fused: list[str]) -> None:
    up, gate, down, activation, count = MODELS[name]
    index = [*MODELS].index(name)
    model, inputs = converted(name, SPECS[index % len(SPECS)])
    torch.set_num_threads(1 + index % 2)
    expected, before, keys = step(model, inputs), attributes(model), [*model.state_dict()]
    for report in (el.fuse(model), el.fuse(model, [inputs])):
        assert len(report.blocks) == count
        for block in report.blocks:
            prefix = block.up.removesuffix(up)
            layers = prefix + up, gate and prefix + gate, prefix + down
            assert (block.up, block.gate, block.down) == layers
            assert (block.activation, block.runs) == (activation, "fused")
            assert all(layer is None or layer.startswith(block.module) for layer in layers)
        assert not fused
        assert_equal(step(model, inputs), expected)
        assert fused == count * [f"{activation}, gated" if gate else activation]
        fused.clear()
    assert [*model.state_dict()] == keys
    modules = [*model.modules()]
    el.unfuse(model)
    assert [*model.modules()] == modules
    assert attributes(model) == before
    assert_equal(step(model, inputs), expected, 0)
    assert not fused
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["Llama", "BERT", "T5, gated", "OPT"])
def test_other_dtypes(name: str, fused: list[str]) -> None:
    model, inputs = converted(name, dtype=torch.float64)
    exact = step(model, inputs)
    el.fuse(model)
    assert_equal(step(model, inputs), exact, 1e-10)
    assert len(fused) == MODELS[name][-1]
    half, inputs = converted(name, dtype=torch.bfloat16)
    half.load_state_dict(model.state_dict())
    exact = step(copy.deepcopy(half).double(), {k: v for k, v in inputs.items()})
    unfused = step(half, inputs)
    fused.clear()
    el.fuse(half)
    found = step(half, inputs)
    assert len(fused) == MODELS[name][-1]
    assert all(tensor.dtype == torch.bfloat16 for tensor in found if tensor.dim())

    def error(tensors: list[Tensor]) -> float:
        """Of all gradients together: some are zero but for rounding."""
        return sum(float((t.double() - e).square().sum()) for t, e in zip(tensors, exact)) ** 0.5

    # hidden features are not rounded
    assert error(found) < 1.2 * error(unfused)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "T5, gated"])
def test_generation(name: str, fused: list[str]) -> None:
    model, inputs = converted(name)
    inputs = {"input_ids": inputs["input_ids"]}
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, **options)  # type: ignore[operator]
    el.fuse(model)
    assert model.generate(**inputs, **options).tolist() == expected.tolist()  # type: ignore[operator]
    assert len(fused) >= 2 * 6


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["Llama", "BERT"])
def test_gradient_checkpointing(name: str, reentrant: bool, fused: list[str]) -> None:
    model, inputs = converted(name)
    model.train()
    expected = step(model, inputs)
    el.fuse(model)
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    model.gradient_checkpointing_enable(**options)  # type: ignore[operator]
    assert_equal(step(model, inputs), expected)
    # transformers checkpoints whole layers without their hooks: those of BERT are the modules with the blocks
    assert len(fused) == (4 if name == "Llama" else 2 if reentrant else 0)
    assert_equal(step(model.eval(), inputs), expected)


def test_checkpoints_and_copies(tmp_path: Path, fused: list[str]) -> None:
    model, inputs = converted("Llama")
    expected, state = step(model, inputs), {name: value.clone() for name, value in model.state_dict().items()}
    el.fuse(model)
    torch.save(model, tmp_path / "model.pt")
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in (*copies, torch.load(tmp_path / "model.pt", weights_only=False)):
        fused.clear()
        assert_equal(step(other, inputs), expected)
        assert len(fused) == 2
        el.unfuse(other)
    fused.clear()
    model.load_state_dict(state)
    model.save_pretrained(tmp_path / "folder")  # type: ignore[operator]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    assert_equal(step(loaded, inputs), expected)
    assert not fused
    assert [block.runs for block in el.fuse(loaded).blocks] == ["fused", "fused"]
    assert_equal(step(loaded, inputs), expected)
    assert len(fused) == 2
    # copies that were unfused share no hooks
    assert_equal(step(model, inputs), expected)
    assert len(fused) == 4


def test_fusing_twice(fused: list[str]) -> None:
    model, inputs = converted("BERT")
    expected = step(model, inputs)
    reports = [el.fuse(model), el.fuse(model), el.fuse(model, [inputs, inputs])]
    assert str(reports[0]) == str(reports[1]) == str(reports[2])
    assert_equal(step(model, inputs), expected)
    assert len(fused) == 2


def test_models_that_changed_after_they_were_fused(fused: list[str]) -> None:
    model, inputs = converted("Llama")
    el.fuse(model)
    expected = step(model, inputs)[0]
    el.densify(model)
    torch.testing.assert_close(step(model, inputs)[0], expected, rtol=1e-4, atol=1e-4)
    assert len(fused) == 2
    el.convert(model, "low_rank(rank=4)")
    step(model, inputs)
    assert len(fused) == 4
    el.convert(make(KINDS["Llama"]), "btt")
    model.model.layers[0].mlp.act_fn = nn.ReLU()  # type: ignore[index, union-attr]
    model.model.layers[1].mlp.act_fn = nn.Mish()  # type: ignore[index, union-attr]
    found = step(model, inputs)
    assert fused[4:] == ["relu, gated"]
    el.unfuse(model)
    assert_equal(found, step(model, inputs))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
def test_lora(fused: list[str]) -> None:
    model, inputs = converted("Llama")
    el.fuse(model)
    names = ["up_proj", "q_proj"]
    tuned = get_peft_model(model, lora.register(LoraConfig(r=2, target_modules=names, init_lora_weights=False)))
    found = step(tuned, inputs)
    assert not fused
    report = el.fuse(tuned)
    assert not report.blocks
    assert dict(report.skipped)["base_model.model.model.layers.0.mlp.up_proj.base_layer"] == (
        "its output is used by add, which fused blocks do not have"
    )
    assert_equal(step(tuned, inputs), found, 0)
    assert not fused
    # adapters elsewhere are no obstacle
    model, _ = converted("Llama")
    tuned = get_peft_model(model, lora.register(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)))
    found = step(tuned, inputs)
    assert len(el.fuse(tuned).blocks) == 2
    assert_equal(step(tuned, inputs), found)
    assert len(fused) == 2
