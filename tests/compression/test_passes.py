"""Passes that leave finished blocks out see what a pass through the whole model sees."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from einlinear.compression.activations import layer_inputs
from einlinear.compression.forward_passes import Passes


class Block(nn.Module):
    runs = 0

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x + self.down(self.up(x).relu())


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        x.mul_(0.5)
        return x.add_(self.down(self.up(x).relu()))


class Pair(Block):
    """Puts out a tuple, as many blocks of transformers do."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return super().forward(x), x


class Model(nn.Module):
    def __init__(self, block: Callable[[], Block] = Block, depth: int = 4, skips: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.skips = skips

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        earlier = [x]
        for block in self.blocks:
            found = block(x)
            x = found[0] if isinstance(found, tuple) else found
            if self.skips and len(earlier) > 1:
                x = x + earlier[-2]
            earlier.append(x.clone())
        return x


NAMES = ["first", *(f"blocks.{i}.{part}" for i in range(4) for part in ("up", "down"))]
DATA = [torch.randn(5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def seen_in_turn(model: nn.Module, passes: Passes, names: list[str]) -> None:
    """Every layer sees what it would in a whole pass, and then is another."""
    for name in names:
        calls = {name: 1}
        found = list(passes.inputs(calls))
        for batch, inputs in zip(DATA, found, strict=True):
            ((expected,),) = layer_inputs(model, batch.clone(), calls).values()
            assert torch.equal(inputs[name][0], expected)
        with torch.no_grad():
            model.get_submodule(name).weight.mul_(0.9)


@pytest.mark.parametrize("block", [Block, InPlace, Pair])
@pytest.mark.parametrize("skips", [False, True])
def test_what_a_whole_pass_sees(block: Callable[[], Block], skips: bool) -> None:
    model = Model(block, skips=skips)
    seen_in_turn(model, Passes(model, DATA), NAMES)
    seen_in_turn(model, Passes(model, DATA), NAMES[::-1])  # from the end: every one begins anew
    assert all("forward" not in vars(module) for module in model.modules())


class Leaving(Block):
    """Blocks that hand on something beside what they put out, as layers that share keys and values do."""

    def __init__(self, left: dict[str, Tensor]) -> None:
        super().__init__()
        self.left = left

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x + self.left.pop("x") if self.reads else x)
        self.left["x"] = x
        return x

    reads = False


def test_blocks_that_read_what_others_left() -> None:
    left: dict[str, Tensor] = {}
    model = Model(lambda: Leaving(left))
    model.blocks[2].reads = True  # type: ignore[union-attr,assignment]
    model.register_forward_pre_hook(lambda *_: left.clear())
    seen_in_turn(model, Passes(model, DATA), NAMES)


def test_blocks_of_a_sequential() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(*(Block() for _ in range(4))))
    passes = Passes(model, DATA)
    seen_in_turn(model, passes, [f"1.{i}.up" for i in range(4)])
    assert passes._start == 3


def test_blocks_that_have_names() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(OrderedDict((name, Block()) for name in "abc")))
    seen_in_turn(model, Passes(model, DATA), [f"1.{name}.up" for name in "abc"])


def test_finished_blocks_are_not_run() -> None:
    model = Model(depth=10)
    passes = Passes(model, DATA)
    for i in range(10):
        for part in ("up", "down"):
            list(passes.inputs({f"blocks.{i}.{part}": 1}))
    runs = [block.runs for block in model.blocks]  # type: ignore[union-attr]
    # once for each layer, once to be kept, and the first batch to compare with; the one before the last is run for that
    assert max(runs) <= 3 * len(DATA) + 2 * 10
    assert sum(runs) < 10 * (3 * len(DATA) + 10)  # of 10 * 10 * len(DATA) were nothing left out


def test_blocks_of_a_model_that_does_not_change_run_once_for_their_last_layer() -> None:
    model = Model(depth=6)
    names = [f"blocks.{i}.{part}" for i in range(6) for part in ("up", "down")]
    passes, blocks = Passes(model, DATA, unchanged=names), list(model.blocks)
    for name in names:
        before = sum(block.runs for block in blocks)  # type: ignore[union-attr]
        for batch, inputs in zip(DATA, passes.inputs({name: 1}), strict=True):
            ((expected,),) = layer_inputs(model, batch, {name: 1}).values()
            assert torch.equal(inputs[name][0], expected)
        if name == "blocks.3.up":  # of which the outputs before are kept: one pass to compare with, and one to look
            runs = sum(block.runs for block in blocks) - before  # type: ignore[union-attr]
            assert runs <= 4 * len(DATA) + 4 + 1 + len(DATA)


def test_layers_of_several_blocks_are_seen_in_one_pass() -> None:
    model = Model()
    calls = dict.fromkeys(NAMES[3:], 1)
    for batch, inputs in zip(DATA, Passes(model, DATA).inputs(calls), strict=True):
        expected = layer_inputs(model, batch, calls)
        assert inputs.keys() == expected.keys()
        assert all(torch.equal(inputs[name][0], expected[name][0]) for name in calls)


def test_a_forward_that_another_library_put_there_stays() -> None:
    model = Model()
    block = model.blocks[0]
    own = block.forward
    block.forward = own  # type: ignore[method-assign]
    list(Passes(model, DATA).inputs({"blocks.2.up": 1}))
    assert vars(block)["forward"] == own


def test_only_batches_that_are_asked_for_are_run() -> None:
    model = Model(depth=4)
    passes, last = Passes(model, DATA), {"blocks.3.up": 1}
    list(passes.inputs({"blocks.2.up": 1}, [0, 1]))
    before = model.blocks[2].runs  # type: ignore[union-attr]
    ((_, inputs),) = zip([2], passes.inputs(last, [2]), strict=True)
    ((expected,),) = layer_inputs(model, DATA[2], last).values()
    assert torch.equal(inputs["blocks.3.up"][0], expected)
    # the first batch to compare with, the batch, and what was expected
    assert model.blocks[2].runs == before + 3  # type: ignore[union-attr]
