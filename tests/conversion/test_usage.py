"""Layers whose weights the model computes with itself, found by running it, and by reading its code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    JambaConfig,
    MambaConfig,
    MambaForCausalLM,
    MobileBertConfig,
    MobileBertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    WavLMConfig,
    WavLMModel,
)
from transformers.models.detr.modeling_detr import DetrMHAttentionMap
from transformers.models.jamba.modeling_jamba import JambaMambaMixer

import einlinear as el
from einlinear.conversion.weight_usage import uncalled_layers

NEVER = "is never called: {} computes with its weight itself, so nothing would be saved"
BESIDES = "is called, but {} also computes with its weight, which would be built every time"


def found(model: nn.Module, *batches: Any) -> dict[str, str]:
    """The reasons by the names of layers."""
    reasons = uncalled_layers(model, batches or None)
    return {name: reasons[id(module)] for name, module in model.named_modules() if id(module) in reasons}


class Functional(nn.Module):
    """A user's own module."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(16, 16)
        self.called = nn.Linear(16, 16)
        self.metadata = nn.Linear(16, 16)
        self.forwarded = nn.Linear(16, 16)
        self.both = nn.Linear(16, 16)
        self.handed = nn.Linear(16, 16)
        self.hidden = nn.ModuleList([nn.Linear(16, 16)])

    def forward(self, x: Tensor) -> Tensor:
        self.metadata = self.metadata.to(x.dtype)
        x = self.project(x.to(self.metadata.weight.dtype))
        x = self.forwarded.forward(self.metadata(x)) + x.new_zeros(self.called.weight.shape[0])
        x = self.called(x) + self.both(x) @ self.both.weight
        return self.run(self.handed, x) @ self.hidden[0].weight.T

    def project(self, x: Tensor) -> Tensor:
        return F.linear(x, self.read.weight, self.read.bias)

    def run(self, layer: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = layer(x)
        return y

    def regularisation(self) -> Tensor:
        """Not in the forward pass."""
        return self.called.weight.square().sum()


def test_custom_module() -> None:
    model = Functional().train()
    x = torch.randn(2, 16)
    assert found(model) == {"read": NEVER.format("Functional")}
    assert found(model, x) == {
        "read": NEVER.format("Functional"),
        "both": BESIDES.format("Functional"),
        "hidden.0": NEVER.format("Functional"),
    }
    assert all("forward" not in vars(module) and module.training for module in model.modules())
    assert found(model, (x,)) == found(model, {"x": x}) == found(model, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_any_way_of_running_the_model() -> None:
    x = torch.randn(2, 16)
    expected = found(Functional(), x)
    compiled = torch.compile(Functional())
    assert found(compiled, x) == {f"_orig_mod.{name}": reason for name, reason in expected.items()}
    model = Functional()
    model.compile()
    assert found(model, x) == expected
    assert found(Functional().to("meta"), x) == expected
    assert found(Functional().requires_grad_(False).double(), x.double()) == expected

    class Noisy(Functional):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.randn_like(x))

    assert found(Noisy(), x).keys() == expected.keys()
    assert found(Noisy()) == {"read": NEVER.format("Noisy")}  # what it inherits
    noisy, state = Noisy(), torch.get_rng_state()
    uncalled_layers(noisy, [x])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_report_has_the_reason() -> None:
    model = Functional()
    report = el.convert(model, "low_rank(rank=4)", example_input=torch.randn(2, 16))
    assert dict(report.skipped)["hidden.0"] == NEVER.format("Functional")
    assert [c.name for c in report.converted] == ["called", "metadata", "forwarded", "handed"]
    model = Functional()
    report = el.convert(model, "low_rank(rank=4)")
    assert report.skipped == (("read", NEVER.format("Functional")),)
    with pytest.raises(RuntimeError):  # the model's own words for an input that it cannot take
        el.convert(Functional(), "btt", example_input=torch.randn(2, 15))


@pytest.mark.parametrize(
    ("example_input", "message"),
    [
        ((torch.randn(2, 16), torch.zeros(2)), "this batch: too many positional arguments.* leave out labels"),
        ({"inputs": torch.randn(2, 16)}, "this batch: .*'inputs'|this batch: missing a required argument: 'x'"),
    ],
)
def test_arguments_that_the_model_does_not_have(example_input: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        el.convert(Functional(), "btt", example_input=example_input)


def test_an_error_of_the_model_is_shown_as_it_is() -> None:
    class Wrong(Functional):
        def forward(self, x: Tensor) -> Tensor:
            raise TypeError("of its own")

    with pytest.raises(TypeError, match=r"^of its own$"):
        el.convert(Wrong(), "btt", example_input=torch.randn(2, 16))


def test_unreached_layers_are_judged_by_source_code() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.never = nn.Linear(16, 16), nn.Linear(16, 16)
            self.attention = nn.MultiheadAttention(16, 2)

        def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
            return self.always(x) if more is None else self.attention(self.never(more), x, x)[0]

    report = el.convert(Optional(), "btt", example_input=torch.randn(2, 16))
    assert [c.name for c in report.converted] == ["always", "never"]
    assert report.skipped == (("attention.out_proj", NEVER.format("MultiheadAttention")),)


@pytest.mark.parametrize("with_input", [False, True])
def test_transformers_of_torch(with_input: bool) -> None:
    """Their fast path takes the weights of layers that they otherwise call: structured ones will be called."""
    model = nn.Transformer(16, 2, 1, 1, 32, batch_first=True)
    x = torch.randn(2, 3, 16)
    names = ["encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn"]
    batches = [(x, x)] if with_input else []
    assert found(model, *batches) == {f"{name}.out_proj": NEVER.format("MultiheadAttention") for name in names}


def test_a_tied_head_has_its_own_reason() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(32, 16), nn.Linear(16, 16), nn.Linear(16, 32, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.body(self.embed(tokens)) @ self.embed.weight.T

    report = el.convert(Language(), "btt", example_input=torch.zeros(2, 3, dtype=torch.int64))
    assert report.skipped[0][1].startswith("its weight is tied to embed")
    assert found(Language(), torch.zeros(2, 3, dtype=torch.int64)) == {"head": NEVER.format("Language")}


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
AUDIO = {"conv_dim": (8,), "conv_stride": (4,), "conv_kernel": (4,), "num_conv_pos_embeddings": 4}


def wavlm() -> tuple[nn.Module, Any, dict[str, str]]:
    config = WavLMConfig(**TINY, **AUDIO, num_feat_extract_layers=1, num_conv_pos_embedding_groups=2, num_buckets=8)
    names = [f"encoder.layers.0.attention.{kind}_proj" for kind in ("k", "v", "q", "out")]
    return WavLMModel(config), torch.randn(1, 200), dict.fromkeys(names, NEVER.format("WavLMAttention"))


def mamba() -> tuple[nn.Module, Any, dict[str, str]]:
    config = MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4, tie_word_embeddings=False)
    tokens = torch.randint(1, 32, (1, 5))
    return MambaForCausalLM(config), tokens, {"backbone.layers.0.mixer.dt_proj": NEVER.format("MambaMixer")}


def mobilebert() -> tuple[nn.Module, Any, dict[str, str]]:
    config = MobileBertConfig(**TINY, vocab_size=32, embedding_size=8, intra_bottleneck_size=16)
    head = NEVER.format("MobileBertLMPredictionHead")
    names = [f"cls.predictions.{name}" for name in ("dense", "decoder")]
    return MobileBertForMaskedLM(config), torch.randint(1, 32, (1, 5)), dict.fromkeys(names, head)


def t5() -> tuple[nn.Module, Any, dict[str, str]]:
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    tokens = torch.randint(1, 32, (1, 5))
    return T5ForConditionalGeneration(config), {"input_ids": tokens, "decoder_input_ids": tokens}, {}


def detr() -> tuple[nn.Module, Any, dict[str, str]]:
    model = nn.ModuleDict({"map": DetrMHAttentionMap(16, 2)})
    model.forward = lambda q, k: model["map"](q, k)
    return model, (torch.randn(1, 3, 16), torch.randn(1, 16, 4, 4)), {"map.k_proj": NEVER.format("DetrMHAttentionMap")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [wavlm, mamba, mobilebert, t5, detr])
def test_models_of_transformers(make: Any) -> None:
    torch.manual_seed(0)
    model, batch, expected = make()
    assert found(model) == expected
    assert found(model, batch) == expected


def test_jamba_calls_a_layer_only_where_it_is_quantised() -> None:
    mixer = JambaMambaMixer(JambaConfig(hidden_size=16, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False), 0)
    assert found(nn.ModuleDict({"mixer": mixer})) == {"mixer.dt_proj": NEVER.format("JambaMambaMixer")}


def test_compress_skips_uncalled_layers() -> None:
    model = nn.Sequential(Functional())
    with pytest.raises(ValueError, match=r"0\.read is never called: Functional computes"):
        el.compress(model, 0.5, ["low_rank"], layers="0.read")
