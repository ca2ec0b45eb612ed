"""Compressed models that learn to do what the original does again."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.compression.test_compress import distance, inputs, trained
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import einlinear as el


class Labelled(nn.Module):
    """A classifier as transformers has them: logits, and a loss where labels are given."""

    def __init__(self) -> None:
        super().__init__()
        self.body = trained((24, 48, 8))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        class Output:
            logits = self.body(x)
            loss = None if labels is None else nn.functional.cross_entropy(logits, labels)

        return Output()


def compressed(model: nn.Module, batches: list[Any]) -> nn.Module:
    smaller = copy.deepcopy(model)
    el.compress(smaller, 0.3, ["low_rank"], batches)
    return smaller


def test_outputs_come_closer_and_the_original_stays() -> None:
    model, batches = trained(), [inputs(200, seed=seed) for seed in range(8)]
    smaller = copy.deepcopy(model)
    el.compress(smaller, 0.3, ["low_rank"])
    state = copy.deepcopy(model.state_dict())
    before = distance(model, smaller, inputs(seed=99))
    model.train()
    distillation = el.distill(smaller, model, batches, steps=300, lr=1e-2)
    assert len(distillation.losses) == 300
    assert distance(model, smaller, inputs(seed=99)) < 0.7 * before
    assert model.training
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())
    assert not any(module._forward_hooks for module in (*model.modules(), *smaller.modules()))


def test_logits_are_compared_as_distributions() -> None:
    model, batches = Labelled(), [{"x": inputs(200, seed=seed)} for seed in range(8)]
    smaller = compressed(model, batches)
    shifted = copy.deepcopy(smaller)
    shifted.body[-1].bias.data += 3.0  # type: ignore[union-attr,index]  # the same distribution
    first = el.distill(copy.deepcopy(smaller), model, batches, steps=1).losses[0]
    assert el.distill(shifted, model, batches, steps=1).losses[0] == pytest.approx(first, rel=1e-3)
    p, q = (m(**batches[0]).logits.detach().log_softmax(1) for m in (model, smaller))
    assert first == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3)
    assert el.distill(smaller, model, batches, steps=300, lr=1e-2).losses[-1] < 0.7 * first


def test_labels_count_if_asked_for() -> None:
    model = Labelled()
    batches: list[Any] = [{"x": inputs(200), "labels": torch.zeros(200, dtype=torch.long)}]
    smaller = compressed(model, batches)
    plain, labelled = (
        el.distill(copy.deepcopy(smaller), model, batches, steps=1, task_loss=weight).losses[0] for weight in (0.0, 2.0)
    )
    assert labelled - plain == pytest.approx(2 * float(smaller(**batches[0]).loss.detach()), rel=1e-3)


def test_modules_in_between_are_matched() -> None:
    model, batches = trained(), [inputs(200, seed=seed) for seed in range(8)]
    smaller = compressed(model, batches)
    alone = el.distill(copy.deepcopy(smaller), model, batches, steps=1).losses[0]
    assert el.distill(smaller, model, batches, steps=1, match=["0", "2"]).losses[0] > alone
    with pytest.raises(ValueError, match="match: 'nothing' matches no module of both models"):
        el.distill(smaller, model, batches, steps=1, match="nothing")
    holder, its = (nn.ModuleDict({"body": m, "unused": nn.Linear(2, 2)}) for m in (model, smaller))
    for m in (holder, its):
        m.forward = m["body"].forward  # type: ignore[method-assign]
    everything = el.distill(its, holder, batches, steps=1, match="*").losses[0]
    assert everything > alone
    with pytest.raises(ValueError, match="match: unused is never called"):
        el.distill(its, holder, batches, steps=1, match="unused")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = trained((24, 48, 24))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x + self.inner(x),)


class Stack(nn.Module):
    """Two blocks, of which the second is called twice, and a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks, self.last = nn.ModuleList([Block(), Block()]), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.blocks, self.blocks[1]):
            (x,) = block(x)
        return self.last(x)  # type: ignore[no-any-return]


def stacks() -> tuple[Stack, Stack, list[Any]]:
    """An original whose blocks are compressed, and batches."""
    model, batches = Stack(), [inputs(200, seed=seed) for seed in range(8)]
    smaller = copy.deepcopy(model)
    el.compress(smaller, 0.4, ["low_rank"], batches, layers="blocks.*")
    return model, smaller, batches


def test_blocks_are_matched_by_default() -> None:
    model, smaller, batches = stacks()

    def first_loss(**options: Any) -> float:
        return el.distill(copy.deepcopy(smaller), model, batches, steps=1, **options).losses[0]

    alone, first = first_loss(match=()), first_loss(match="blocks.0")
    # every call counts
    outputs: list[list[Tensor]] = [[], []]
    for m, kept in zip((model, smaller), outputs, strict=True):
        handle = m.blocks[1].register_forward_hook(lambda _, __, output, kept=kept: kept.append(output[0].detach()))
        m(batches[0])
        handle.remove()
    errors = [float((x - y).square().mean() / (y - y.mean(0)).square().mean()) for y, x in zip(*outputs, strict=True)]
    assert len(errors) == 2
    assert first_loss(match="blocks.1") == pytest.approx(alone + sum(errors), rel=1e-4)
    assert first_loss() == first_loss(match=["blocks.0", "blocks.1"]) == pytest.approx(first + sum(errors), rel=1e-4)


def test_only_structured_layers_are_trained_if_asked_for() -> None:
    model, smaller, batches = stacks()
    start = copy.deepcopy(smaller)
    losses = el.distill(smaller, model, batches, steps=97, lr=1e-2, train="structured").losses
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.requires_grad for p in smaller.parameters())
    for p, q in zip(smaller.last.parameters(), start.last.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.grad is None
    for module, before in zip(smaller.modules(), start.modules(), strict=True):
        if isinstance(module, el.Linear):
            assert not any(torch.equal(p, q) for p, q in zip(module.parameters(), before.parameters(), strict=True))
    with pytest.raises(ValueError, match="no structured layer requires gradients: give train='all'"):
        el.distill(copy.deepcopy(model), model, batches, steps=1, train="structured")


def test_low_rank_additions_become_part_of_dense_weights(tmp_path: Path) -> None:
    model, smaller, batches = stacks()
    smaller.last.weight.data += 0.3 * torch.randn(24, 24)
    start, stopped, whole = (copy.deepcopy(smaller) for _ in range(3))
    options: dict[str, Any] = {"steps": 97, "lr": 1e-2, "train": "adapters", "adapter_rank": 2}
    state = torch.get_rng_state()
    whole_losses = el.distill(whole, model, batches, **options).losses
    assert torch.equal(torch.get_rng_state(), state)
    assert whole_losses[-1] < 0.9 * whole_losses[0]
    change = whole.last.weight - start.last.weight
    assert torch.linalg.matrix_rank(change.detach(), rtol=1e-4) == 2
    assert torch.equal(whole.last.bias, start.last.bias)
    assert whole.state_dict().keys() == start.state_dict().keys()
    assert not any(module._forward_hooks for module in whole.modules())
    # the merged model computes what the model with additions did
    again = el.distill(copy.deepcopy(whole), model, batches[:1], steps=1, lr=1e-9).losses[0]
    assert again == pytest.approx(whole_losses[-1], rel=0.1)

    def interrupt(done: int, *_: object) -> None:
        if done == 40:
            raise KeyboardInterrupt

    # the additions start the same whatever the global generator
    torch.manual_seed(7)
    with pytest.raises(KeyboardInterrupt):
        el.distill(stopped, model, batches, **options, folder=tmp_path, checkpoint_every=0, progress=interrupt)
    # what was learnt until then is merged as well
    assert not torch.equal(stopped.last.weight, start.last.weight)
    assert all(p.requires_grad for p in stopped.parameters())
    assert el.distill(smaller, model, batches, **options, folder=tmp_path).losses == whole_losses
    assert all(torch.equal(p, q) for p, q in zip(smaller.parameters(), whole.parameters(), strict=True))
    with pytest.raises(ValueError, match="another config: adapter_rank"):
        el.distill(copy.deepcopy(start), model, batches, **{**options, "adapter_rank": 3}, folder=tmp_path)


def test_rounded_weights_stay_and_the_rest_is_trained() -> None:
    model, batches = Stack(), [inputs(200, seed=seed) for seed in range(8)]
    smaller = copy.deepcopy(model)
    el.compress(smaller, 0.1, ["low_rank"], batches, count="bytes", layers="blocks.*")
    start = copy.deepcopy(smaller)
    losses = el.distill(smaller, model, batches, steps=97, lr=1e-2).losses
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(p, q) for p, q in zip(smaller.buffers(), start.buffers(), strict=True))
    assert not torch.equal(smaller.last.weight, start.last.weight)
    for p in smaller.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="quantised weights cannot be trained: distill first, then quantise"):
        el.distill(smaller, model, batches, steps=1)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_structured_layers_learn_at_their_own_rates(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = trained(), [inputs(200)]
    smaller = compressed(model, batches)
    groups = el.param_groups(smaller, 1.0, base=model, optimizer=optimizer)
    expected = {tuple(g["param_names"]): g["lr_mult"] for g in groups}
    seen: list[dict[tuple[str, ...], float]] = []
    cls: Any = el.mup.Muon if optimizer == "muon" else torch.optim.AdamW
    step = cls.step

    def note(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        seen.append({tuple(g["param_names"]): g["lr"] for g in self.param_groups})
        return step(self, *args, **kwargs)

    monkeypatch.setattr(cls, "step", note)
    el.distill(smaller, model, batches, steps=20, lr=1e-2, optimizer=optimizer)
    peak = max(max(rates.values()) for rates in seen) / max(expected.values())
    assert peak == pytest.approx(1e-2, rel=0.1)
    for rates in seen:
        factors = {rates[names] / mult for names, mult in expected.items()}
        assert max(factors) == pytest.approx(min(factors))
    assert len(set(expected.values())) > 1


def test_gradient_checkpointing_stays_on_and_dropout_off() -> None:
    class Checkpointed(nn.Module):
        gradient_checkpointing = True

        def __init__(self) -> None:
            super().__init__()
            self.body, self.dropout, self.runs = trained(), nn.Dropout(0.5), 0

        def _run(self, x: Tensor) -> Tensor:
            self.runs += 1
            return self.dropout(self.body(x))  # type: ignore[no-any-return]

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return self._run(x)
            return checkpoint(self._run, x, use_reentrant=False)  # type: ignore[no-any-return]

    model, batches = Checkpointed().eval(), [inputs(200)]
    smaller = compressed(model, batches)
    smaller.runs = model.runs = 0  # type: ignore[assignment]
    losses = [el.distill(copy.deepcopy(smaller), model, batches, steps=2).losses for _ in range(2)]
    assert losses[0] == losses[1]
    again = copy.deepcopy(smaller)
    el.distill(again, model, batches, steps=3)
    assert again.runs == 6  # forward, and once more in the backward pass
    assert not again.training


def test_it_ends_in_time() -> None:
    model, batches = trained(), [inputs(200)]
    start = time.monotonic()
    distillation = el.distill(compressed(model, batches), model, batches, steps=10**9, seconds=1.0)
    assert 0.5 < distillation.seconds < 3
    assert time.monotonic() - start < 10


def test_it_goes_on_after_an_interruption(tmp_path: Path) -> None:
    model, batches = trained(), [inputs(200, seed=seed) for seed in range(3)]
    whole, stopped = (compressed(model, batches) for _ in range(2))
    options: dict[str, Any] = {"steps": 20, "lr": 1e-2}
    expected = el.distill(whole, model, batches, **options)

    def interrupt(done: int, *_: object) -> None:
        if done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        el.distill(stopped, model, batches, **options, folder=tmp_path, checkpoint_every=0, progress=interrupt)
    again, other = compressed(model, batches), copy.deepcopy(model)
    other[0].weight.data.mul_(1.1)  # type: ignore[union-attr,operator]
    with pytest.raises(ValueError, match=r"another config: lr"):
        el.distill(again, model, batches, steps=20, lr=1e-3, folder=tmp_path)
    with pytest.raises(ValueError, match=r"another config: original"):
        el.distill(again, other, batches, **options, folder=tmp_path)
    another = compressed(model, [inputs(200, seed=9)])  # of the same original
    with pytest.raises(ValueError, match=r"another config: model"):
        el.distill(another, model, batches, **options, folder=tmp_path)
    found = el.distill(again, model, batches, **options, folder=tmp_path)
    assert found.losses == expected.losses
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), whole.parameters(), strict=True))
    more = el.distill(compressed(model, batches), model, batches, **options, folder=tmp_path)
    assert more.losses == expected.losses  # it was done


def test_bfloat16_learns_what_float32_does(tmp_path: Path) -> None:
    model, batches = trained(), [inputs(200, seed=seed) for seed in range(8)]
    smaller = compressed(model, batches)
    half, full = (copy.deepcopy(smaller).bfloat16() for _ in range(2))
    original = copy.deepcopy(model).bfloat16()
    data = [batch.bfloat16() for batch in batches]
    # steps of a thousandth of what bfloat16 can tell apart from the parameters
    options: dict[str, Any] = {"steps": 200, "lr": 3e-5}
    start = copy.deepcopy(full)
    expected = el.distill(full.float(), copy.deepcopy(original).float(), [b.float() for b in data], **options)
    found = el.distill(half, original, data, **options, folder=tmp_path, checkpoint_every=0)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    moved = [(p.float() - q.float()).norm() for p, q in zip(half.parameters(), start.parameters(), strict=True)]
    wanted = [(p - q.float()).norm() for p, q in zip(full.parameters(), start.parameters(), strict=True)]
    assert sum(moved) > 0.5 * sum(wanted)
    assert found.losses[-1] == pytest.approx(expected.losses[-1], rel=0.05)


def test_mistakes(tmp_path: Path) -> None:
    model, batches = trained(), [inputs(200)]
    smaller = compressed(model, batches)
    with pytest.raises(ValueError, match="there are no batches to train on"):
        el.distill(smaller, model, [], steps=5)
    with pytest.raises(ValueError, match="the batches ended after 2 steps: give a list or a DataLoader"):
        el.distill(copy.deepcopy(smaller), model, (inputs(20) for _ in range(2)), steps=5)
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        el.distill(smaller, model, batches, steps=0)
    with pytest.raises(ValueError, match="lr must be a positive number, not 0"):
        el.distill(smaller, model, batches, steps=5, lr=0)
    for wrong in ({"clip": 0.0}, {"clip": -1.0}, {"warmup": 1.0}, {"warmup": -1.0}, {"weight_decay": -1.0}):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"{name} must be .* not {value:g}"):
            el.distill(smaller, model, batches, steps=5, **wrong)
    with pytest.raises(ValueError, match="optimizer must be 'muon' or 'adamw', not 'sgd'"):
        el.distill(smaller, model, batches, steps=5, optimizer="sgd")
    with pytest.raises(ValueError, match="seconds must be positive, or None for no limit, not 0"):
        el.distill(smaller, model, batches, steps=5, seconds=0.0)
    with pytest.raises(ValueError, match=r"the loss is nan at step 1: take a lower lr than 0\.001"):
        el.distill(smaller, model, [inputs(200) * torch.nan], steps=5)
    with pytest.raises(ValueError, match="float16 parameters cannot be trained"):
        el.distill(copy.deepcopy(smaller).half(), model, batches, steps=5)
    with pytest.raises(ValueError, match="task_loss needs batches with labels"):
        el.distill(smaller, model, batches, steps=5, task_loss=1.0)
    with pytest.raises(ValueError, match=r"0\.weight is the original's own parameter"):
        el.distill(copy.copy(model), model, batches, steps=5)
    with pytest.raises(ValueError, match="train must be 'all', 'structured' or 'adapters', not 'some'"):
        el.distill(smaller, model, batches, steps=5, train="some")
    with pytest.raises(ValueError, match="adapter_rank must be at least 1, not 0"):
        el.distill(smaller, model, batches, steps=5, adapter_rank=0)
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "new"):
        with pytest.raises(ValueError, match=r"folder .*file.* cannot be a folder: .*file is a file$"):
            el.distill(smaller, model, batches, steps=5, folder=folder)
    with pytest.raises(ValueError, match="no parameter of the model requires gradients"):
        el.distill(smaller.requires_grad_(False), model, batches, steps=5)
