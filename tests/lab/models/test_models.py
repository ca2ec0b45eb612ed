"""The reference models: what they compute, what they tell about themselves, how they start and how they learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import einlinear as el
from einlinear.mup.factor_multipliers import adam_multipliers
from einlinear_lab.models import GPT, ReferenceModel, ResidualMLP, ViT
from einlinear_lab.models.blocks import Attention, ResidualFeedForward, TransformerBlock

VOCAB, CONTEXT, CLASSES = 20, 12, 5
Build = Callable[..., ReferenceModel]


def mlp(width: int = 32, structure: str = "btt", **options: Any) -> ResidualMLP:
    return ResidualMLP(48, width, CLASSES, depth=2, structure=structure, **options)


def vit(width: int = 32, structure: str = "btt", **options: Any) -> ViT:
    config: dict[str, Any] = {"patch_size": 4, "depth": 2, "heads": 4, "structure": structure}
    return ViT((8, 12), width, CLASSES, **config | options)


def gpt(width: int = 32, structure: str = "btt", **options: Any) -> GPT:
    config: dict[str, Any] = {"depth": 2, "d_head": 16, "structure": structure, "head_structure": structure}
    return GPT(VOCAB, width, CONTEXT, **{"normalize": False} | config | options)


def inputs(build: Build, n: int = 3) -> Tensor:
    torch.manual_seed(0)
    if build is gpt:
        return torch.randint(VOCAB, (n, CONTEXT))
    return torch.randn((n, 3, 8, 12) if build is vit else (n, 48))


def shaken(model: nn.Module) -> nn.Module:
    """The model in float64, with values of its own in every norm and bias."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.double().parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


every_model = pytest.mark.parametrize("build", [mlp, vit, gpt])
with_tokens = pytest.mark.parametrize("build", [vit, gpt])


# What they are made of


@every_model
def test_roles_have_structures_of_their_own(build: Build) -> None:
    roles = {"up": "low_rank(rank=2)", "down": "monarch(blocks=2)"}
    if build is not mlp:
        roles |= {"attention_in": "dense", "attention_out": "kronecker"}
    model = build(**{f"{role}_structure": structure for role, structure in roles.items()})
    right = {"fc1": "up", "fc2": "down", "out": "attention_out"} | dict.fromkeys(
        ("query", "key", "value"), "attention_in"
    )
    seen = set()
    for name, layer in model.named_modules():
        if isinstance(layer, el.Linear):
            role = right.get(name.rpartition(".")[-1])
            expected = el.structure(roles.get(role or "", "btt"), layer.in_features, layer.out_features).spec
            assert layer.structure.spec == expected
            seen.add(role)
    assert roles.keys() | {None} == seen


def test_roles_that_cannot_be() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'query_structure'"):
        gpt(query_structure="btt")
    with pytest.raises(ValueError, match="experts that are whole networks have one structure"):
        gpt(up_structure="btt", experts=2, routed="feed_forward")
    with pytest.raises(TypeError, match="unexpected keyword argument 'attention_in_structure'"):
        ResidualMLP(48, 32, CLASSES, attention_in_structure="btt")


# What they compute


@every_model
def test_shapes(build: Build) -> None:
    y = build()(inputs(build))
    assert y.shape == ((3, CONTEXT, VOCAB) if build is gpt else (3, CLASSES))
    assert gpt()(inputs(gpt)[:1, :1]).shape == (1, 1, VOCAB)


def plain_norm(norm: Any, x: Tensor) -> Tensor:
    if isinstance(norm, nn.Identity):
        return x
    centred = x - x.mean(-1, keepdim=True)
    y = norm.weight * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return y if norm.bias is None else y + norm.bias


def plain_linear(layer: Any, x: Tensor) -> Tensor:
    y = x @ layer.weight.T
    return y if layer.bias is None else y + layer.bias


def plain_block(block: TransformerBlock, x: Tensor, d_head: int, causal: bool, multiplier: float) -> Tensor:
    """A block for a single sequence x of shape (t, width): one head, query and key after the other."""
    a = block.attention
    h = plain_norm(a.norm, x)
    heads = []
    for start in range(0, a.query.out_features, d_head):
        q, k, v = (plain_linear(layer, h)[:, start : start + d_head] for layer in (a.query, a.key, a.value))
        q, k = plain_norm(a.query_norm, q), plain_norm(a.key_norm, k)
        rows = []
        for i in range(len(x)):
            seen = range(i + 1 if causal else len(x))
            weights = torch.stack([q[i] @ k[j] * 8 / d_head for j in seen]).exp()
            rows.append(torch.stack([weights[j] * v[j] for j in seen]).sum(0) / weights.sum())
        heads.append(torch.stack(rows))
    x = x + multiplier * plain_linear(a.out, torch.cat(heads, 1))
    f = block.feed_forward
    h = plain_linear(f.fc1, plain_norm(f.norm, x))
    return x + multiplier * plain_linear(f.fc2, h * (1 + torch.erf(h / 2**0.5)) / 2)


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": False, "bias": True, "depth": 4}, {"normalize": True}, {"heads": 3}]
)
def test_gpt_is_what_is_written_out(options: dict[str, Any]) -> None:
    model: Any = shaken(gpt(**options))
    (tokens,) = inputs(gpt, 1)
    x = torch.stack([model.embedding.weight[token] + model.positions.weight[i] for i, token in enumerate(tokens)])
    for block in model.blocks:
        x = plain_block(block, x, 16, True, {2: 1.5**0.5, 4: 0.75**0.5}[len(model.blocks)])
    expected = plain_linear(model.head, plain_norm(model.norm, x))
    torch.testing.assert_close(model(tokens[None])[0], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "bias": False}, {"normalize": True, "expansion": 2}])
def test_vit_is_what_is_written_out(options: dict[str, Any]) -> None:
    model: Any = shaken(vit(**options))
    (image,) = inputs(vit, 1).double()
    patches = [image[:, r : r + 4, c : c + 4].flatten() for r in (0, 4) for c in (0, 4, 8)]
    x = plain_linear(model.patches, torch.stack(patches)) + model.positions.weight
    for block in model.blocks:
        x = plain_block(block, x, 8, False, 1.0)
    expected = plain_linear(model.head, plain_norm(model.norm, x).mean(0))
    torch.testing.assert_close(model(image[None])[0], expected, rtol=0, atol=1e-10)


def test_heads_say_how_wide_attention_is() -> None:
    def features(**options: Any) -> tuple[int, int]:
        attention: Any = gpt(**options).get_submodule("blocks.0.attention")
        return attention.heads, attention.query.out_features

    assert features(heads=8, d_head=None) == (8, 32)
    assert features(heads=3, d_head=16) == (3, 48)  # wider than the model


def test_the_input_layer_may_have_a_structure_of_its_own() -> None:
    specs = [
        [layer.structure.spec for layer in model.modules() if isinstance(layer, el.Linear)]
        for model in (
            ResidualMLP(48, 32, 5, depth=1, structure="btt", input_structure="dense"),
            vit(depth=1, input_structure="dense"),
        )
    ]
    assert [own[0] for own in specs] == ["dense", "dense"]
    assert all(set(own[1:]) == {"btt"} for own in specs)


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model, tokens = shaken(gpt()), inputs(gpt)
    y, later = model(tokens), tokens.clone()
    later[:, 7] = (later[:, 7] + 1) % VOCAB
    torch.testing.assert_close(model(later)[:, :7], y[:, :7], rtol=0, atol=1e-12)
    assert ((model(later) - y)[:, 7:].abs().amax((0, 2)) > 1e-6).all()
    torch.testing.assert_close(model(tokens[:, :7]), y[:, :7], rtol=0, atol=1e-12)


@with_tokens
def test_only_structured_layers_are_normalised_and_layernorm_replaces_gamma(build: Build) -> None:
    def gammas(**options: Any) -> set[str]:
        return {name for name, _ in build(**options).named_parameters() if "gamma" in name}

    assert gammas(normalize=False) == gammas(normalize=True, structure="dense") == set()
    with_both = gammas(normalize=True, qk_norm=True)
    assert {"blocks.1.attention.out.gamma_B", "blocks.1.feed_forward.fc1.gamma_A"} < with_both
    assert gammas(normalize=True, qk_norm=False) - with_both == {
        f"blocks.{i}.attention.{name}.gamma_{factor}" for i in (0, 1) for name in ("query", "key") for factor in "AB"
    }
    if build is gpt:
        assert "head.gamma_A" not in gammas(normalize=True, head_structure="dense")
        assert "head.gamma_A" in gammas(normalize=True, structure="dense", head_structure="btt")
    if build is vit:
        assert "patches.gamma_A" not in gammas(normalize=True, input_structure="dense")
        assert "patches.gamma_A" in gammas(normalize=True, structure="dense", input_structure="btt")
    query: Any = build(normalize=True, qk_norm=True).get_submodule("blocks.0.attention.query")
    with torch.no_grad():
        query.A.mul_(100)
        before = query.dense_weight()
        query.A.mul_(100)
    torch.testing.assert_close(query.dense_weight(), before)


# As citizens of torch


@every_model
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_compile_without_graph_breaks(build: Build) -> None:
    torch._dynamo.reset()
    model, x = build(), inputs(build)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


@every_model
def test_meta_device_and_files(build: Build) -> None:
    with torch.device("meta"):
        meta = build()
    assert all(p.is_meta for p in meta.parameters())
    assert meta(inputs(build).to("meta")).is_meta
    model, other, x = build(), build(), inputs(build)
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    with pytest.raises(RuntimeError, match=r"is btt, but was saved as monarch|size mismatch"):
        other.load_state_dict(build(structure="monarch(blocks=2)").state_dict())


@every_model
def test_autocast_and_half_precision(build: Build) -> None:
    model, x = build(), inputs(build)
    y = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(x).float(), y, rtol=0.1, atol=0.1)
    half = model.bfloat16()(x if build is gpt else x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y, rtol=0.1, atol=0.1)


# How they start


@every_model
@pytest.mark.parametrize("structure", ["dense", "btt(rank=2)"])
def test_at_the_start_blocks_do_nothing_and_logits_are_zero(build: Build, structure: str) -> None:
    model, x = build(structure=structure), inputs(build)
    el.init_(model, base=build(64, "dense"), zero=model.ZERO)
    assert not model(x).any()
    h = torch.randn(2, 6, 32)
    assert torch.equal(model.blocks(h), h)
    for name, layer in model.named_modules():
        starts_at_zero = name.endswith(("fc2", "out", "head", *(["query"] if build is vit else [])))
        if isinstance(layer, el.Linear):
            assert layer.dense_weight().any() != starts_at_zero, name
            if structure != "dense":
                assert layer.A.any(), name
                assert layer.B.any() != starts_at_zero, name


@every_model
def test_the_last_block_is_named(build: Build) -> None:
    model = build()
    assert model.get_submodule(model.last_block) is model.blocks[1]


# How they learn


@with_tokens
@pytest.mark.parametrize("structure", ["dense", "btt"])
def test_learning_rates(build: Build, structure: str) -> None:
    options = {"qk_norm": True, "normalize": True, "bias": True}
    model = build(128, structure, **options)
    with torch.device("meta"):
        base = build(64, "dense", **options)
    found = {
        name: group["lr_mult"]
        for group in el.param_groups(model, lr=0.1, base=base, lr_scale=model.LR_SCALE)
        for name in group["param_names"]
    }
    expected = dict.fromkeys(dict(model.named_parameters()), 1.0)  # embeddings, norms, biases, gammas
    for name, layer in model.named_modules():
        mup = 1.0 if name == "patches" else 64 / 128  # the size of patches does not grow with the width
        if isinstance(layer, el.Linear):
            multipliers = adam_multipliers(layer.structure)
            expected |= {f"{name}.{f.name}": mup * m for f, m in zip(layer.structure.factors, multipliers, strict=True)}
        elif isinstance(layer, nn.Linear):
            expected[f"{name}.weight"] = mup
    assert found == pytest.approx(expected)
    assert found["positions.weight"] == found["blocks.0.attention.key_norm.weight"] == found["norm.bias"] == 1
    if structure == "btt":
        assert found["blocks.0.attention.out.A"] == 128 / 8 / 2 / 2  # 128 = 8 16
        assert found["blocks.0.attention.out.B"] == 128 / 16 / 2 / 2
    el.param_groups(model, lr=0.1, base=None)
    el.param_groups(model, lr=0.1, base=base, optimizer="sgd")


@with_tokens
def test_features_move_alike_at_every_width_with_the_structure_aware_rule_only(build: Build) -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x).flatten(0, -2), y.flatten())

    def start(width: int) -> ReferenceModel:
        torch.manual_seed(width)
        model = build(width)
        el.init_(model, zero=model.ZERO)
        return model

    x = inputs(build, 32)
    y = x.roll(-1, 1) if build is gpt else torch.randint(CLASSES, (32,))
    base = build(32, "dense")
    growth = {}
    for aware in (True, False):
        narrow, wide = el.coord_check(
            start,
            [32, 512],
            [(x, y)],
            x,
            lr=3e-3,
            base=base,
            layers=base.last_block,
            steps=10,
            loss=loss,
            structure_aware=aware,
        )
        growth[aware] = wide.relative_update / narrow.relative_update
    assert 0.6 < growth[True] < 1.6
    assert growth[False] < 0.6


# Mistakes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gpt(40), "a width of 40 cannot be divided into heads of 16 features"),
        (lambda: gpt(d_head=0), "a width of 32 cannot be divided into heads of 0 features"),
        (lambda: gpt(d_head=None), "give d_head, heads or both"),
        (lambda: gpt(heads=0), "a width of 32 cannot be divided into 0 heads"),
        (lambda: vit(34), "a width of 34 cannot be divided into 4 heads"),
        (lambda: vit(heads=0), "a width of 32 cannot be divided into 0 heads"),
        (lambda: vit(patch_size=3), "images of 8 x 12 cannot be cut into patches of 3 x 3"),
        (lambda: gpt(depth=0), "depth must be at least 1, not 0"),
        (lambda: vit(depth=0), "depth must be at least 1, not 0"),
        (lambda: ResidualMLP(48, 32, 5, depth=0), "depth must be at least 1, not 0"),
        (lambda: gpt()(torch.zeros(1, 13, dtype=torch.long)), "of 13 tokens is longer than the context of 12"),
        (lambda: vit()(torch.zeros(2, 3, 12, 8)), r"must be of shape \(n, 3, 8, 12\), not \(2, 3, 12, 8\)"),
        (lambda: gpt(structure="btn"), "unknown family 'btn'"),
        (lambda: vit(structure="btn"), "unknown family 'btn'"),
        (lambda: gpt(head_structure="btn"), "unknown family 'btn'"),
    ],
)
def test_mistakes(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_every_argument_changes_something() -> None:
    plain = sum(p.numel() for p in vit().parameters())
    for options in ({"bias": False}, {"qk_norm": True}, {"expansion": 2}, {"channels": 1}, {"normalize": True}):
        assert sum(p.numel() for p in vit(**options).parameters()) != plain
    plain = sum(p.numel() for p in gpt().parameters())
    for options in ({"bias": True}, {"qk_norm": False}, {"expansion": 2}, {"head_structure": "dense"}):
        assert sum(p.numel() for p in gpt(**options).parameters()) != plain
    assert ViT(8, 32, 5, heads=4, patch_size=4).tokens == 4
    assert isinstance(vit().blocks[0].attention, Attention)
    assert isinstance(vit().blocks[0].feed_forward, ResidualFeedForward)
