"""Large vocabularies: logits are compared a few tokens at a time, exactly as if they all were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import einlinear as el
from einlinear.compression.activations import model_output
from einlinear.compression.divergence import mean_kl_divergence, summed_kl_divergence
from einlinear.compression.sensitivity import SensitivityProbe
from einlinear_lab.bench.memory import peak_bytes

VOCABULARY = 16_000
BATCHES = [
    {"input_ids": torch.randint(VOCABULARY, (4, 128), generator=torch.Generator().manual_seed(i))} for i in (0, 1)
]


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config).eval()
    model.lm_head.weight.data.mul_(20)  # answers that are not all alike
    return model


def forward_peak(model: nn.Module) -> int:
    with torch.no_grad():
        return peak_bytes(lambda: model(**BATCHES[0]), "cpu")


def test_compression_takes_little_more_than_a_forward_pass() -> None:
    model = llama()
    before = forward_peak(model)
    assert before > 4 * BATCHES[0]["input_ids"].numel() * VOCABULARY
    after = peak_bytes(lambda: el.compress(model, 0.6, ["low_rank(rank=4)"], BATCHES, layers="*o_proj"), "cpu")
    assert after <= 1.5 * before


def test_distillation_holds_the_logits_once() -> None:
    model = llama()
    smaller = copy.deepcopy(model)
    el.compress(smaller, 0.9, ["low_rank"])
    smaller.requires_grad_(False)
    smaller.model.layers[0].requires_grad_(True)  # the optimiser takes no memory for embeddings
    before = forward_peak(model)
    assert peak_bytes(lambda: el.distill(smaller, model, BATCHES, steps=1), "cpu") <= 1.5 * before


class Language(nn.Module):
    """Logits of a large vocabulary, of which `end` is what the model puts out."""

    def __init__(self, scale: float | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.scale = nn.Linear(8, 12), nn.Linear(12, 5000), scale
        self.to(dtype)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
        class Output:
            logits = self.head(self.first(x).tanh())
            if self.scale is not None:
                logits = logits * self.scale

        return Output()


def exact(model: Language, other: Language, batch: dict[str, Tensor]) -> Tensor:
    kept = batch["attention_mask"].bool()
    p, q = (m(**batch).logits.float()[kept].log_softmax(1) for m in (model, other))
    return F.kl_div(q, p, log_target=True, reduction="batchmean")


def masked(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    mask = torch.ones(6, 40, dtype=torch.long)
    mask[:, 30:] = 0
    return {"x": torch.randn(6, 40, 8, generator=torch.Generator().manual_seed(1)).to(dtype), "attention_mask": mask}


@pytest.mark.parametrize("layer", ["first", "head"])
@pytest.mark.parametrize(("scale", "head"), [(None, "head"), (0.5, None)])
def test_the_measured_divergence_is_exact(scale: float | None, head: str | None, layer: str) -> None:
    model, batch = Language(scale), masked()
    assert model_output(model, batch).head == head
    other = copy.deepcopy(model)
    own = other.get_submodule(layer)
    change, shift = 0.1 * torch.randn_like(own.weight), 0.1 * torch.randn_like(own.bias)
    with torch.no_grad():
        own.weight += change
        own.bias += shift
        expected = float(exact(model, other, batch))
    moved = SensitivityProbe(model, [batch]).output_change(model.get_submodule(layer), change, shift)
    assert moved == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_distillation_minimises_the_exact_divergence(scale: float | None, dtype: torch.dtype) -> None:
    model, batch = Language(scale, dtype), masked(dtype)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.first.weight += 0.3
    expected = exact(model, copy.deepcopy(other), batch)
    steps = el.distill(copy.deepcopy(other), model, [batch], steps=3, lr=1e-2, warmup=0.0)
    assert steps.losses[0] == pytest.approx(float(expected.detach()), rel=1e-3 if dtype == torch.float32 else 0.03)
    assert steps.losses[-1] < steps.losses[0]


@pytest.mark.parametrize("in_place", [True, False])
def test_gradients_of_the_divergence(in_place: bool) -> None:
    right, weight = torch.randn(300, 5000), torch.randn(300, 5000, requires_grad=True)
    expected = F.kl_div(weight.log_softmax(1), right.log_softmax(1), log_target=True, reduction="batchmean")
    (wanted,) = torch.autograd.grad(expected, weight)
    loss = mean_kl_divergence(weight.clone(), lambda part: right[part], in_place)
    (found,) = torch.autograd.grad(3 * loss, weight)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    torch.testing.assert_close(found, 3 * wanted, rtol=1e-3, atol=1e-9)
    assert summed_kl_divergence(right, weight.detach()) / 300 == pytest.approx(float(expected.detach()), rel=1e-4)


def test_heads_that_another_batch_does_not_end_with() -> None:
    class Branching(Language):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
            output = super().forward(x)
            if float(x[0, 0, 0]) > 0:
                output.logits = output.logits + 1.0
            return output

    model, batches = Branching(), [masked(), masked()]
    for batch, sign in zip(batches, (1, -1), strict=True):
        batch["x"][0, 0, 0] = sign
    assert [model_output(model, batch).head for batch in batches] == [None, "head"]
    assert SensitivityProbe(model, batches).output_change(model.first, torch.zeros(12, 8), None) == pytest.approx(
        0, abs=1e-6
    )
