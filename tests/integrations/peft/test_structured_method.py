"""The method STRUCTURED of peft, from the config to the Trainer, and its equality with LoRA and LoKr of peft."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integrations.transformers.models import make, output
from tests.integrations.transformers.test_training import trainer
from tests.lab.data.samples import needs
from torch import nn
from transformers import GPT2LMHeadModel

import einlinear as el
from einlinear.nn import QuantizedLinear

pytest.importorskip("peft")

from peft import LoKrConfig, LoraConfig, PeftModel, convert_to_lora, get_peft_model

from einlinear.integrations.peft import StructuredConfig
from einlinear.integrations.peft.structured_method import StructuredAdapterLinear

pytestmark = [
    needs("accelerate"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # peft asks for it
]


def config(**options: Any) -> StructuredConfig:
    return StructuredConfig(**{"structure": "monarch(blocks=4)", "target_modules": "all-linear"} | options)


def draw(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("structure", [None, "btt(rank=2)"])
def test_from_the_config_to_the_merged_model(name: str, structure: str | None, tmp_path: Path) -> None:
    model = make(name, structure)
    before = output(model)
    tuned = get_peft_model(model, config(scale=2.0)).eval()
    assert torch.equal(output(tuned), before)
    draw(tuned)
    after = output(tuned)
    assert not torch.allclose(after, before, atol=1e-3)
    with tuned.disable_adapter():
        assert torch.equal(output(tuned), before)
    tuned.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["structure"], saved["scale"]) == ("STRUCTURED", "monarch(blocks=4)", 2.0)
    again = PeftModel.from_pretrained(make(name, structure), tmp_path).eval()
    assert torch.equal(output(again), after)
    light = PeftModel.from_pretrained(make(name, structure), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(output(light), after)
    if structure is not None:
        with pytest.raises(ValueError, match=r"into a structured layer \(btt\(rank=2\)\).*el\.densify"):
            tuned.merge_and_unload()
        el.densify(tuned)
        torch.testing.assert_close(output(tuned), after)
    weights = {key: value.clone() for key, value in tuned.state_dict().items()}
    tuned.merge_adapter()
    torch.testing.assert_close(output(tuned), after)
    tuned.unmerge_adapter()
    assert all(torch.equal(weights[key], value) for key, value in tuned.state_dict().items())
    merged = tuned.merge_and_unload()
    assert type(merged) is type(model)
    assert not any(isinstance(module, StructuredAdapterLinear) for module in merged.modules())
    torch.testing.assert_close(output(merged), after)


def test_all_linear_targets_what_lora_targets() -> None:
    def targets(method: Any) -> set[str]:
        tuned = get_peft_model(make("llama", None), method)
        return {name for name, module in tuned.named_modules() if hasattr(module, "base_layer")}

    expected = targets(LoraConfig(r=2, target_modules="all-linear"))
    assert targets(config()) == expected != set()
    assert targets(config(exclude_modules=["q_proj"])) == {name for name in expected if not name.endswith("q_proj")}
    assert targets(config(target_modules=None)) == targets(LoraConfig(r=2))
    one = config(target_modules=["q_proj"], layers_to_transform=[1])
    assert targets(one) == {"base_model.model.model.layers.1.self_attn.q_proj"}


def test_several_adapters_and_modules_to_save(tmp_path: Path) -> None:
    tuned = get_peft_model(make("llama"), config(modules_to_save=["lm_head"])).eval()
    draw(tuned)
    first = output(tuned)
    tuned.add_adapter("second", config(structure="low_rank(rank=2)", target_modules=["q_proj"]))
    tuned.set_adapter("second")
    draw(tuned)
    assert not torch.allclose(output(tuned), first, atol=1e-3)
    tuned.set_adapter("default")
    assert torch.equal(output(tuned), first)
    tuned.delete_adapter("second")
    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make("llama"), tmp_path).eval()
    assert torch.equal(output(again), first)


def test_trainer(tmp_path: Path) -> None:
    make("gpt2").save_pretrained(tmp_path / "start")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "start")
    before = output(base)
    tuned = get_peft_model(base, config(task_type="CAUSAL_LM"))
    trainer(tuned, tmp_path / "run", learning_rate=1e-2, save_steps=1, max_steps=2).train()
    after = output(tuned.eval())
    assert not torch.allclose(after, before, atol=1e-3)
    with tuned.disable_adapter():
        assert torch.equal(output(tuned), before)
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "start")
    again = PeftModel.from_pretrained(base, tmp_path / "run" / "checkpoint-2").eval()
    assert torch.equal(output(again), after)


def test_adapters_of_transformers_itself(tmp_path: Path) -> None:
    model = make("llama", None)
    model.add_adapter(config())
    draw(model)
    after = output(model)
    model.save_pretrained(tmp_path)
    other = make("llama", None)
    other.load_adapter(str(tmp_path))
    assert torch.equal(output(other), after)


def test_quantised_layers_and_half_precision() -> None:
    class Model(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)  # type: ignore[no-any-return]

    x = torch.randn(3, 64)
    model = Model(QuantizedLinear(64, 64, "btt", precision="int8"), nn.Linear(64, 64))
    tuned = get_peft_model(model, config())
    draw(tuned)
    assert tuned(x).any()
    with pytest.raises(ValueError, match=r"0: an adapter cannot be merged into a quantised layer"):
        tuned.merge_adapter()
    assert not tuned.base_model.model[1].merged
    tuned = get_peft_model(Model(nn.Linear(64, 64)).bfloat16(), config())
    assert tuned.base_model.model[0].structured_adapters["default"].A.dtype == torch.float32
    assert tuned(x.bfloat16()).dtype == torch.bfloat16


def test_conversion_to_lora() -> None:
    tuned = get_peft_model(make("llama", None), config(structure="low_rank(rank=2)")).eval()
    draw(tuned)
    lora = PeftModel(make("llama", None), convert_to_lora(tuned, rank=2)[0])
    assert lora.peft_config["default"].r == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"structure": ""}, ValueError, "needs the structure of the adapters"),
        ({"structure": "mono"}, ValueError, "mono"),
        ({"structure": 3}, TypeError, "3"),
        ({"scale": "1"}, TypeError, "scale must be a number"),
        ({"dropout": 1}, ValueError, "dropout must be from 0"),
        ({"layers_pattern": "layers"}, ValueError, "give layers_to_transform as well"),
        ({"target_modules": ["embed_tokens"]}, TypeError, "embed_tokens: is a Embedding, and no linear layer"),
        ({"target_modules": ["nothing"]}, ValueError, "not found in the base model"),
        ({"structure": "monarch(blocks=5)"}, ValueError, r"k_proj: .*; exclude_modules leaves it out"),
    ],
)
def test_bad_configs(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        get_peft_model(make("llama", None), config(**options))


def test_adapters_load_where_only_einlinear_is_imported(tmp_path: Path) -> None:
    get_peft_model(make("llama", None), config()).save_pretrained(tmp_path)
    code = f"import einlinear, peft; print(peft.PeftConfig.from_pretrained({str(tmp_path)!r}).structure)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "monarch(blocks=4)"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.tanh(self.up(x)))
        return y


# of peft: the config, and the names of its factors A and B; the same structure for both layers
TARGETS = ["up", "down"]
LORA: Any = LoraConfig(r=4, lora_alpha=2, target_modules=TARGETS), ("lora_A.default.weight", "lora_B.default.weight")
LOKR: Any = LoKrConfig(r=64, alpha=32, target_modules=TARGETS), ("lokr_w2.default", "lokr_w1.default")


@pytest.mark.parametrize("through_peft", [True, False])
@pytest.mark.parametrize(
    ("theirs", "structure"), [(LORA, "low_rank(rank=4)"), (LOKR, "(b a), d a, e b -> (e d) where b=8, e=8")]
)
def test_lora_and_lokr_of_peft(theirs: Any, structure: str, through_peft: bool) -> None:
    """Outputs, gradients, and 20 steps of AdamW are equal up to rounding, from equal starting values."""
    model, x = Model().double(), torch.randn(7, 64, dtype=torch.float64)
    method, names = theirs
    expected = get_peft_model(copy.deepcopy(model), copy.deepcopy(method))
    if through_peft:
        config = StructuredConfig(structure=structure, scale=0.5, target_modules=TARGETS)
        tuned: Any = get_peft_model(model, config)
        prefix, between = "base_model.model.", "structured_adapters.default"
    else:
        tuned, (prefix, between) = model, ("", "adapters.default")
        el.adapt(model, structure, scale=0.5)
    pairs = [
        (tuned.get_parameter(f"{prefix}{layer}.{between}.{factor}"),
         expected.get_parameter(f"base_model.model.{layer}.{name}"))
        for layer in ("up", "down")
        for factor, name in zip("AB", names, strict=True)
    ]  # fmt: skip
    assert len(pairs) == sum(p.requires_grad for p in expected.parameters())
    with torch.no_grad():
        for ours, their in pairs:
            their.copy_(ours)
    optimizers = [torch.optim.AdamW(filter(lambda p: p.requires_grad, m.parameters()), 1e-2) for m in (tuned, expected)]
    for _ in range(20):
        outputs = [m(x) for m in (tuned, expected)]
        torch.testing.assert_close(*outputs, rtol=1e-11, atol=1e-11)
        for y, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            (y - x).square().mean().backward()
        for ours, their in pairs:
            torch.testing.assert_close(ours.grad, their.grad, rtol=1e-9, atol=1e-13)
        for optimizer in optimizers:
            optimizer.step()
    for ours, their in pairs:
        torch.testing.assert_close(ours, their, rtol=1e-9, atol=1e-11)
        assert ours.abs().max() > 1e-2
