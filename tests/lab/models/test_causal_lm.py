"""OPT and Pythia: what is structured, what comes out, what it costs, how it starts and how it learns."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.lab.data.samples import prose
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import einlinear as el
from einlinear.mup.coordinate_check import TrainingBatch
from einlinear.mup.factor_multipliers import adam_multipliers
from einlinear.structures import DoesNotFit
from einlinear_lab.data import TextConfig, prepare_tokens
from einlinear_lab.models import causal_lm
from einlinear_lab.models.causal_lm import OPT, CausalLM, Pythia
from einlinear_lab.runs.execution import execute
from einlinear_lab.runs.run import Run
from einlinear_lab.training import TrainingConfig, train

VOCAB, CONTEXT, DEPTH = 20, 12, 2

both = pytest.mark.parametrize("kind", [OPT, Pythia])


def build(kind: type[CausalLM], width: int = 32, structure: str = "dyad", **options: Any) -> CausalLM:
    torch.manual_seed(0)
    return kind(VOCAB, width, CONTEXT, **{"depth": DEPTH, "heads": 2, "structure": structure} | options)


def tokens(length: int = CONTEXT) -> Tensor:
    return torch.randint(VOCAB, (3, length), generator=torch.Generator().manual_seed(1))


def linear(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | el.Linear)}


# What it is


@both
def test_only_the_feed_forward_layers_are_structured(kind: type[CausalLM]) -> None:
    model, dense = build(kind, structure="dyad(variant=dt)"), build(kind, structure="dense")
    before = linear(dense)
    assert all(type(layer) is nn.Linear for layer in before.values())
    assert linear(model).keys() == before.keys()
    structured = {name for name, layer in linear(model).items() if isinstance(layer, el.Linear)}
    names = ("fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h")
    assert structured == {name for name in before if name.rpartition(".")[2] in names}
    assert len(structured) == 2 * DEPTH
    for name in structured:
        layer: Any = model.get_submodule(name)
        assert layer.structure.spec == "dyad(variant=dt)"
        assert layer.bias is not None
        assert {layer.in_features, layer.out_features} == {32, 128}


@both
@pytest.mark.parametrize("structure", ["dense", "dyad"])
def test_logits_are_those_of_transformers_and_see_no_later_token(kind: type[CausalLM], structure: str) -> None:
    model, x = build(kind, structure=structure).eval(), tokens()
    with torch.no_grad():
        y = model(x)
        assert y.shape == (3, CONTEXT, VOCAB)
        assert torch.equal(model.train()(x), y)  # nothing is dropped out
        torch.testing.assert_close(model(x[:, :5]), y[:, :5], atol=1e-6, rtol=1e-4)
        for later in range(1, CONTEXT):
            changed = x.clone()
            changed[:, later] = (x[:, later] + 1) % VOCAB
            z = model(changed)
            assert torch.equal(z[:, :later], y[:, :later])
            assert not torch.allclose(z[:, later:], y[:, later:])


@both
def test_every_token_is_one_of_the_data(kind: type[CausalLM]) -> None:
    """None pads, so every row of the embedding is drawn and trained, and none is that of the head."""
    model = build(kind)
    F.cross_entropy(model(torch.arange(CONTEXT)[None]).flatten(0, 1), torch.arange(CONTEXT)).backward()
    embedding: Any = model.model.get_input_embeddings()
    assert embedding.padding_idx is None
    assert embedding.weight[:CONTEXT].std(1).gt(0).all()
    assert embedding.weight.grad[:CONTEXT].abs().sum(1).gt(0).all()
    assert embedding.weight is not model.model.get_output_embeddings().weight


@both
def test_scores_are_those_of_mup(kind: type[CausalLM]) -> None:
    """Multiplied by 8 / d_head, whatever the width: the attention of a block is computed again by hand."""
    model = build(kind, heads=4)
    assert [block.get_submodule(kind.ATTENTION).scaling for block in model.blocks] == [1.0] * DEPTH
    assert build(kind, 128, heads=2).blocks[0].get_submodule(kind.ATTENTION).scaling == 64**-0.5  # as published
    if kind is OPT:
        attention: Any = model.blocks[0].self_attn
        x = torch.randn(1, 3, 32)
        q, k, v = (
            m(x).unflatten(-1, (4, 8)).transpose(1, 2) for m in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        mixed = (q @ k.mT).masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf).softmax(-1) @ v
        torch.testing.assert_close(attention(x)[0], attention.out_proj(mixed.transpose(1, 2).flatten(2)))


@both
@pytest.mark.parametrize("structure", ["dense", "dyad", "dyad(blocks=8)"])
def test_macs_are_those_counted_by_hand(kind: type[CausalLM], structure: str) -> None:
    model, width = build(kind, structure=structure), 32
    share = {"dense": 1, "dyad": 1 / 2, "dyad(blocks=8)": 1 / 4}[structure]
    of_block = 4 * width**2 + 2 * CONTEXT * width + share * 2 * width * 4 * width
    assert model.macs == DEPTH * of_block + width * VOCAB
    with el.backend("reference"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens())
    assert counter.get_total_flops() == 2 * model.macs * tokens().numel()


# How it starts, and learns


@both
@pytest.mark.parametrize("structure", ["dense", "dyad"])
def test_at_the_start_blocks_do_nothing_and_logits_are_zero(kind: type[CausalLM], structure: str) -> None:
    model = build(kind, structure=structure)
    el.init_(model, base=build(kind, 64, "dense"), zero=model.ZERO)
    assert not model(tokens()).any()
    stream: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, given, out: stream.extend((given[0], out)))
    model(tokens())
    assert all(torch.equal(found, stream[0]) for found in stream)
    assert stream[0].any()
    for name, layer in linear(model).items():
        weight = layer.dense_weight() if isinstance(layer, el.Linear) else layer.weight
        ends = ("out_proj", "fc2", "attention.dense", "4h_to_h", "lm_head")
        assert bool(weight.any()) != name.endswith(ends), name  # type: ignore[operator]
        if weight.any():  # type: ignore[operator]
            assert float(weight.detach().std()) == pytest.approx(32**-0.5, rel=0.1), name  # type: ignore[operator]


@both
def test_matrices_learn_slower_the_wider_they_are(kind: type[CausalLM]) -> None:
    model, width = build(kind, 128), 128
    with torch.device("meta"):
        base = build(kind, 32, "dense")
    groups = el.param_groups(model, lr=0.1, base=base)
    found = {name: group["lr_mult"] for group in groups for name in group["param_names"]}
    expected = dict.fromkeys(dict(model.named_parameters()), 1.0)  # embeddings, positions, norms, biases
    for name, layer in linear(model).items():
        mup = 32 / width  # also of the second layer, whose input is four times as wide here and in the base
        if isinstance(layer, el.Linear):
            multipliers = adam_multipliers(layer.structure)
            expected |= {f"{name}.{f.name}": mup * m for f, m in zip(layer.structure.factors, multipliers, strict=True)}
        else:
            expected[f"{name}.weight"] = mup
    assert found == pytest.approx(expected)


class Copying:
    """The next token is the one before it."""

    def batch(self, step: int) -> TrainingBatch:
        x = torch.randint(VOCAB, (4, CONTEXT), generator=torch.Generator().manual_seed(step))
        return x, x.roll(1, 1)

    def loss(self, model: nn.Module, batch: TrainingBatch) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        return {"error": self.loss(model, self.batch(-1)).item()}


@both
def test_muon_takes_the_matrices_of_the_blocks(kind: type[CausalLM], monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    monkeypatch.setattr(
        "einlinear_lab.training.loop.Muon",
        lambda groups, **_: (
            taken.extend(name for group in groups if "matrix_view" in group for name in group["param_names"]),
            torch.optim.SGD(groups, lr=0.0),
        )[1],
    )
    model = el.init_(build(kind), zero=kind.ZERO)
    train(model, build(kind, structure="dense"), Copying(), TrainingConfig(steps=1, optimizer="muon"))
    inside = [name for name, p in model.named_parameters() if f"{kind.BLOCKS}." in name and p.dim() > 1]
    assert sorted(taken) == sorted(inside)


@both
def test_the_last_block_is_named(kind: type[CausalLM]) -> None:
    model = build(kind)
    assert model.get_submodule(model.last_block) is model.blocks[DEPTH - 1]


@pytest.mark.parametrize("model", ["opt", "pythia"])
def test_a_run_learns(model: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(prose(1000), encoding="utf-8")
    prepare_tokens(TextConfig(sources=(str(tmp_path / "text.txt"),)), tmp_path / "tokens")
    options = {"model": model, "data": str(tmp_path / "tokens"), "structure": "dyad", "width": 32, "depth": 1}
    options |= {"context": 16, "batch_size": 8, "steps": 40, "lr": 1e-2, "threads": 1, "validation_tokens": 256}
    losses: list[float] = []
    made = Run.of(options)
    found = execute(made, tmp_path / "run", lambda step, steps, loss: losses.append(loss), keep_checkpoints=True)
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    assert found.compute == found.macs * 8 * 16 * 40
    assert found.memory is not None
    assert 0 <= found.memory - 4 * 4 * found.params < 200  # and AdamW's count of steps, for every tensor
    (tmp_path / "run" / "result.json").unlink()
    again = execute(made, tmp_path / "run")  # from its last checkpoint
    assert (again.train_loss, again.metrics, again.memory) == (found.train_loss, found.metrics, found.memory)


# Mistakes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build(OPT, heads=3), "a width of 32 cannot be divided into 3 heads"),
        (lambda: build(Pythia, heads=0), "a width of 32 cannot be divided into 0 heads"),
        (lambda: build(Pythia)(tokens(CONTEXT + 1)), "a sequence of 13 tokens is longer than the context of 12"),
        (lambda: build(OPT, structure="dyid"), "unknown family 'dyid'"),
    ],
)
def test_mistakes(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_no_layer_is_left_dense_where_a_structure_does_not_fit() -> None:
    for one in (32, 128):  # input features that one of the two layers has
        with pytest.raises(DoesNotFit):
            build(OPT, structure=f"i, o i -> o where i={one}")


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"not installed \(transformers\).* pip install 'einlinear\[pretrained"
    ):
        build(OPT)


def test_transformers_is_imported_only_for_such_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # whoever imports it gets an ImportError
    runpy.run_path(causal_lm.__file__)
    assert Run.of({"model": "opt", "data": "x", "steps": 1}).model.NAME == "opt"
