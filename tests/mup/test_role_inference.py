"""Inferred roles: every model of transformers gets groups and an initialisation without being told any role."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AriaTextConfig,
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    WavLMConfig,
    WavLMForCTC,
    XLNetConfig,
    XLNetLMHeadModel,
)
from transformers.models.aria.modeling_aria import AriaExperts

import einlinear as el
from einlinear.mup.parameter_roles import infer_role

_HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_hidden_layers": 1}
_WAVE: dict[str, Any] = {"vocab_size": 48, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
_IDS: dict[str, Any] = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _sizes(width: int) -> dict[str, Any]:
    return {"hidden_size": width, "intermediate_size": 2 * width, **_HEADS}


def _text(width: int) -> dict[str, Any]:
    return {**_sizes(width), "num_key_value_heads": 1, "head_dim": width // 2, **_IDS}


def _vision(width: int) -> dict[str, Any]:
    return {**_sizes(width), "image_size": 8, "patch_size": 4}


def _llava(width: int) -> PreTrainedModel:
    vision = {**_vision(width), "model_type": "clip_vision_model"}
    text = {**_text(width), "model_type": "llama"}
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=47))


MODELS: dict[str, Callable[[int], PreTrainedModel]] = {
    "bert": lambda w: BertForMaskedLM(BertConfig(vocab_size=48, max_position_embeddings=16, **_sizes(w))),
    "vit": lambda w: ViTForImageClassification(ViTConfig(**_vision(w))),
    "clip": lambda w: CLIPModel(
        CLIPConfig(text_config={**_sizes(w), **_IDS}, vision_config=_vision(w), projection_dim=w)
    ),
    "swin": lambda w: SwinForImageClassification(
        SwinConfig(image_size=16, patch_size=2, embed_dim=w, depths=[1, 1], num_heads=[2, 4], window_size=4)
    ),
    "mamba": lambda w: MambaForCausalLM(MambaConfig(hidden_size=w, num_hidden_layers=1, **_IDS)),
    "mamba2": lambda w: Mamba2ForCausalLM(
        Mamba2Config(hidden_size=w, num_hidden_layers=1, num_heads=w // 4, head_dim=8, n_groups=1, **_IDS)
    ),
    "mixtral": lambda w: MixtralForCausalLM(MixtralConfig(**_text(w), num_local_experts=4)),
    "gpt_oss": lambda w: GptOssForCausalLM(GptOssConfig(**_text(w), num_local_experts=4)),
    "wavlm": lambda w: WavLMForCTC(
        WavLMConfig(**_sizes(w), **_WAVE, conv_dim=(w, w), conv_stride=(2, 2), conv_kernel=(3, 3))
    ),
    "llava": _llava,
}


def multipliers(groups: list[dict[str, Any]]) -> dict[str, float]:
    return {name: group["lr_mult"] for group in groups for name in group["param_names"]}


@pytest.mark.parametrize("name", MODELS)
def test_models_need_no_roles(name: str) -> None:
    model = MODELS[name](32)
    el.convert(model, "low_rank(rank=2)")
    groups = el.param_groups(model, lr=1e-3, base=None)
    assert sorted(multipliers(groups)) == sorted(key for key, _ in model.named_parameters())
    assert {*multipliers(el.param_groups(MODELS[name](32), lr=1e-3, base=None)).values()} == {1.0}
    before = {key: p.clone() for key, p in model.named_parameters()}
    el.init_(model)
    for group in groups:
        for key in group.get("inferred", ()):
            if "experts" not in key:
                assert torch.equal(model.get_parameter(key), before[key])
    torch.optim.AdamW(groups)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "wavlm"])
def test_learning_rates_from_a_narrower_base(name: str) -> None:
    mult = multipliers(el.param_groups(MODELS[name](64), lr=1e-3, base=MODELS[name](32)))
    wide, narrow = MODELS[name](64), MODELS[name](32)
    linear = [f"{n}.weight" for n, m in wide.named_modules() if type(m) is nn.Linear]
    assert len(linear) > 2
    for key in linear:
        if key in mult:
            shape, base = wide.get_parameter(key).shape, narrow.get_parameter(key).shape
            assert mult[key] == pytest.approx(base[1] / shape[1])
    words = ("cls_token", "class_embedding", "position_embeddings", "bias", "A_log", ".D", "norm.weight", "sinks")
    for key, m in mult.items():
        if key.endswith(words):
            assert m == 1, key


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_stacks_of_experts_are_matrices(name: str) -> None:
    """GPT-OSS has them transposed, and biases beside them."""
    torch.manual_seed(0)
    model, base = MODELS[name](64), MODELS[name](32)
    mult = multipliers(el.param_groups(model, lr=1e-3, base=base))
    experts = "model.layers.0.mlp.experts."
    assert mult[f"{experts}gate_up_proj"] == mult[f"{experts}down_proj"] == 1 / 2
    sgd = multipliers(el.param_groups(model, lr=1e-3, base=base, optimizer="sgd"))
    assert sgd[f"{experts}gate_up_proj"] == sgd[f"{experts}down_proj"] == 1
    el.init_(model, base=el.base_shapes(base))
    up, down = model.get_parameter(f"{experts}gate_up_proj"), model.get_parameter(f"{experts}down_proj")
    assert float(up.detach().std()) == pytest.approx(math.sqrt(64) / 64, rel=0.1)
    assert float(down.detach().std()) == pytest.approx(math.sqrt(64) / 128, rel=0.1)
    muon = el.param_groups(model, lr=1e-3, base=base, optimizer="muon")
    shapes = {key: group["matrix_view"] for group in muon if "matrix_view" in group for key in group["param_names"]}
    assert shapes[f"{experts}gate_up_proj"] == ((0, 1, 2), *up.shape[1:])


def test_hidden_role_for_stacks_of_experts() -> None:
    model, base = MODELS["gpt_oss"](64), MODELS["gpt_oss"](32)
    roles = {"*experts.*_proj": "hidden"}
    mult = multipliers(el.param_groups(model, lr=1e-3, base=base, roles=roles))
    assert mult == multipliers(el.param_groups(model, lr=1e-3, base=base))


def test_experts_are_drawn_with_any_base() -> None:
    for base in (None, MODELS["mixtral"](64), MODELS["mixtral"](32)):
        torch.manual_seed(0)
        model = el.init_(MODELS["mixtral"](64), base=base)
        stack = model.get_parameter("model.layers.0.mlp.experts.down_proj")
        assert float(stack.detach().std()) == pytest.approx(math.sqrt(64) / 128, rel=0.1)


@pytest.mark.parametrize("name", ["vit", "gpt_oss", "mamba", "clip"])
def test_matrices_and_tables_decay(name: str) -> None:
    """As known parameters do: matrices and tables, but no biases, scales, or single tokens."""
    groups = el.param_groups(MODELS[name](32), lr=1e-3, base=None, weight_decay=0.1)
    decays = {key for group in groups if group["weight_decay"] for key in group["param_names"]}
    others = {key for group in groups for key in group["param_names"]} - decays
    assert all(
        not key.endswith(("bias", "cls_token", "A_log", ".D", "sinks", "scale", "norm.weight")) for key in decays
    )
    assert all(not key.endswith(("position_embeddings", "proj", "proj.weight")) for key in others)


def test_the_shapes_of_transposed_experts() -> None:
    config = AriaTextConfig(hidden_size=32, intermediate_size=64, moe_num_experts=4)
    experts = AriaExperts(config)
    s = infer_role("experts.gate_up_proj", type(experts).__name__, experts.gate_up_proj.shape, experts.is_transposed)
    assert s is not None
    assert (s.in_features, s.out_features, s.stacked) == (32, 128, True)


_TABLES = (
    "embeddings.position_embeddings",
    "rel_pos_h",
    "pos_embeds.0",
    "register_tokens",
    "anything",
)


@pytest.mark.parametrize(
    ("name", "shape", "base"),
    [
        ("cls_token", (1, 1, 64), None),
        ("embeddings.position_embeddings", (1, 5, 64), (1, 5, 32)),
        ("rel_pos_h", (27, 64), (27, 32)),
        ("relative_position_bias_table", (49, 4), (49, 2)),
        ("mixer.A_log", (128, 16), (64, 16)),
        ("D", (128,), (64,)),
        ("pos_embeds.0", (5, 64), (5, 32)),
        ("pos_bias_u", (4, 16), (2, 8)),
        ("layer_scale", (64, 1, 1), (32, 1, 1)),
        ("register_tokens", (1, 0, 64), None),
        ("anything", (10, 8), (10, 8)),
        ("Own", (1,), None),
    ],
)
def test_vectors(name: str, shape: tuple[int, ...], base: tuple[int, ...] | None) -> None:
    role = infer_role(name, "Own", shape, base=base)
    assert role is not None
    assert role.kind == ("input" if name in _TABLES else "vector")


@pytest.mark.parametrize(
    ("name", "shape", "base", "expected"),
    [
        ("mixer", (128, 64), (64, 32), (64, 128, False)),
        ("embed_proj", (128, 64), None, (64, 128, False)),
        ("kernel", (16, 8, 3, 3), None, (72, 16, False)),
        ("mixer", (128, 8), (64, 8), (8, 128, False)),
        ("gate.weight", (4, 64), (4, 32), (64, 4, False)),
        ("mlp.experts.w1", (4, 128, 64), None, (64, 128, True)),
        ("heads_mixer", (4, 128, 64), (4, 64, 32), (64, 128, True)),
    ],
)
def test_matrices(
    name: str, shape: tuple[int, ...], base: tuple[int, ...] | None, expected: tuple[int, int, bool]
) -> None:
    role = infer_role(name, "Own", shape, base=base)
    assert role is not None
    assert role.is_matrix
    assert (role.in_features, role.out_features, role.stacked) == expected


@pytest.mark.parametrize(
    ("name", "shape", "base"),
    [
        ("things", (10, 64), (10, 32)),
        ("position_mixer", (64, 64), (32, 32)),
        ("stack", (4, 8, 64), (4, 8, 32)),
    ],
)
def test_contradictions_have_no_role(name: str, shape: tuple[int, ...], base: tuple[int, ...]) -> None:
    assert infer_role(name, "Own", shape, base=base) is None


@pytest.mark.parametrize("layer", [nn.ConvTranspose1d, nn.ConvTranspose2d])
def test_transposed_convolutions_are_matrices(layer: Any) -> None:
    mult = multipliers(el.param_groups(layer(64, 8, 3), 1e-3, base=layer(16, 8, 3)))
    assert mult == {"weight": 1 / 4, "bias": 1}


def test_features_that_are_tensors() -> None:
    """As in layers of transformers whose sizes were computed."""
    layer = nn.Linear(4, 4)
    layer.in_features = torch.tensor(4)  # type: ignore[assignment]
    assert {type(m) for m in multipliers(el.param_groups(layer, 1e-3, base=None)).values()} == {float}


def test_recurrent_layers_are_matrices() -> None:
    mult = multipliers(el.param_groups(nn.LSTM(64, 64, 2), 1e-3, base=nn.LSTM(16, 16, 2)))
    assert {key: m for key, m in mult.items() if "weight" in key} == {
        f"weight_{part}_l{i}": 1 / 4 for part in ("ih", "hh") for i in (0, 1)
    }
    assert mult["bias_ih_l0"] == 1


def test_xlnet() -> None:
    """Weights of three axes that are no stacks: (width, heads, features of a head)."""

    def build(width: int) -> PreTrainedModel:
        return XLNetLMHeadModel(XLNetConfig(vocab_size=48, d_model=width, n_layer=1, n_head=2, d_inner=2 * width))

    mult = multipliers(el.param_groups(build(64), lr=1e-3, base=build(32)))
    assert mult["transformer.layer.0.rel_attn.q"] == 1 / 2
    assert mult["transformer.layer.0.rel_attn.r_w_bias"] == 1


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_parameters_without_entries(optimizer: str) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_tokens = nn.Parameter(torch.empty(1, 0, 32))
            self.empty, self.layer = nn.Linear(0, 8), nn.Linear(32, 8)

    groups = el.param_groups(Tokens(), 1e-3, base=None, optimizer=optimizer)
    names = {name: group["lr_mult"] for group in groups for name in group["param_names"]}
    assert names == dict.fromkeys(["register_tokens", "empty.weight", "empty.bias", "layer.weight", "layer.bias"], 1.0)
