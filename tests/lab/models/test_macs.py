"""MACs and parameters of whole models, against torch's own counter of what is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import einlinear as el
from einlinear_lab.models import GPT, MLPConfig, ReferenceModel, ResidualMLP, ViT
from einlinear_lab.models.blocks import Attention, Layers
from einlinear_lab.models.macs import linear_macs, macs_per_token, params


def computed(model: nn.Module, x: torch.Tensor) -> int:
    """What a forward pass multiplies and adds, by operators: einsum one by one, attention as two products."""
    with el.backend("reference"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // 2


# 23 tokens: the structured heads that need it are padded to 24 outputs
@pytest.mark.parametrize("structure", ["dense", "btt(rank=2)", "low_rank", "monarch(blocks=2)"])
def test_what_is_counted_is_what_is_computed(structure: str) -> None:
    models: list[tuple[ReferenceModel, torch.Tensor, int]] = [
        (ResidualMLP(48, 24, 10, depth=2, structure=structure), torch.randn(3, 48), 3),
        (ViT((8, 12), 24, 10, patch_size=4, depth=2, heads=2, structure=structure), torch.randn(3, 3, 8, 12), 3),
        (ViT(8, 24, 10, channels=1, patch_size=2, heads=4, qk_norm=True), torch.randn(3, 1, 8, 8), 3),
        (GPT(20, 24, 12, depth=2, d_head=8, structure=structure), torch.randint(20, (3, 12)), 3 * 12),
        (GPT(20, 24, 12, d_head=8, heads=2, structure=structure), torch.randint(20, (3, 12)), 3 * 12),
        (GPT(23, 24, 12, d_head=24, structure=structure, head_structure=structure), torch.randint(23, (1, 12)), 12),
    ]
    for model, x, inputs in models:
        assert inputs * model.macs == computed(model, x)
    gpt, x, _ = models[3]
    assert x[:, :5].numel() * macs_per_token(gpt, tokens=5) == computed(gpt, x[:, :5])


def test_counts_by_hand() -> None:
    model = ResidualMLP(64, 16, 10, depth=2, structure="btt")
    by_hand = 8 * 4 * 8 + 4 * 8 * 4  # the input layer: 64 = 8 8 to 16 = 4 4
    by_hand += 2 * (2 * (4 * 8 * 4 + 8 * 4 * 8))  # two blocks of 16 -> 64 and 64 -> 16
    assert model.macs == by_hand + 16 * 10
    gpt = GPT(20, 32, 12, depth=2, d_head=16)
    of_blocks = 2 * (4 * 32**2 + 2 * 12 * 32 + 2 * 32 * 128)
    assert (gpt.non_embedding_macs, gpt.macs) == (of_blocks, of_blocks + 32 * 20)
    of_blocks = 2 * (4 * 32**2 + 2 * 32 * 128 + 2 * 32 + 2 * 16)  # no biases; two norms, and two on heads
    assert params(gpt.blocks) == of_blocks
    assert params(gpt) == of_blocks + 20 * 32 + 12 * 32 + 32 + 32 * 20


def test_layers_of_others_are_counted() -> None:
    assert macs_per_token(nn.Sequential(nn.Linear(3, 5), nn.GELU(), el.Linear(5, 7, "dense"))) == 3 * 5 + 5 * 7
    assert macs_per_token(nn.ModuleList([Conv1D(7, 3), nn.LayerNorm((4, 4)), nn.Embedding(9, 3)])) == 3 * 7
    assert params(nn.Linear(3, 5)) == 3 * 5 + 5


class LoRA(nn.Linear):
    """A linear layer with weights that `nn.Linear` does not have."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.down, self.up = nn.Parameter(torch.zeros(1, 4)), nn.Parameter(torch.zeros(4, 1))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.MultiheadAttention(8, 2), "the MACs of 0, a MultiheadAttention, are unknown: .* in_proj_weight$"),
        (nn.MultiheadAttention(8, 2, kdim=4), "k_proj_weight, q_proj_weight, v_proj_weight$"),
        (nn.Conv2d(3, 3, 3), "a Conv2d, are unknown"),
        (nn.LSTM(3, 3), "an? LSTM, are unknown"),
        (nn.Bilinear(3, 3, 3), "a Bilinear, are unknown"),
        (LoRA(), "a LoRA, are unknown: it has weights of its own, down, up$"),
        (spectral_norm(nn.Linear(3, 3)), "a ParametrizationList, are unknown"),
        (
            Attention(8, 2, Layers(MLPConfig()).linear),
            "0 is attention, whose cost depends on the sequence: give tokens=",
        ),
    ],
)
def test_what_is_not_known_is_not_counted_wrongly(module: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        macs_per_token(nn.Sequential(module))


class OthersAttention(nn.Module):
    """Its linear layers are known, the products between them are not."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))


def test_attention_of_others_is_not_passed_over() -> None:
    model = nn.Sequential(OthersAttention(), nn.Linear(4, 5))
    with pytest.raises(ValueError, match="0 is a OthersAttention: the products of its attention are unknown"):
        macs_per_token(model, tokens=8)
    assert linear_macs(model) == 3 * 4 * 4 + 4 * 5


def test_attention_is_known_of_transformers_alone() -> None:
    """A class of a user's that has the same name may compute something else."""
    own = type("OPTAttention", (OthersAttention,), {})()
    with pytest.raises(ValueError, match="is a OPTAttention: the products of its attention are unknown"):
        macs_per_token(nn.Sequential(own), tokens=8)


def test_wrappers_do_not_count_twice() -> None:
    layer = el.Linear(8, 8, "btt")
    wrapped = checkpoint_wrapper(torch.compile(layer, backend="eager"))  # both pass on the attributes of what they wrap
    assert macs_per_token(wrapped) == layer.structure.macs
