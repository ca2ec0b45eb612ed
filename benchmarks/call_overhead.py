"""Overhead of a call of small layers, beside two `nn.Linear` of the same size; and several layers in one call.

    python benchmarks/call_overhead.py
    python benchmarks/call_overhead.py --shared-input --features 256 1024 --tokens 1 512 2048 --rounds 10

A structured layer has two factors or more, so two dense layers are what its call may cost. One token, float32, one
thread. The variants run in turns, and the table has the least processor time of all turns: other work on the machine
counts little.

With --shared-input, three layers have the same input, as queries, keys and values have. They run one after the other,
and by one call of `ops.shared_input_linear`, which multiplies with all three at once where that is faster.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import einlinear as el
from einlinear_lab.bench.timing import interleave

SPECS = "low_rank(rank={d/8}); btt; btt(rank=2); monarch(blocks=4); dyad"
CALLS = 50


def inference(first: nn.Module, second: nn.Module | None, x: Tensor) -> Callable[[], object]:
    """Forward passes."""

    def run() -> None:
        with torch.no_grad():
            for _ in range(CALLS):
                y = first(x)
                if second is not None:
                    second(y)

    return run


def training(first: nn.Module, second: nn.Module | None, x: Tensor) -> Callable[[], object]:
    """Forward and backward passes, with the gradients of the input and of all parameters."""
    x = x.clone().requires_grad_()
    wanted = [x, *first.parameters(), *(() if second is None else second.parameters())]
    grad = torch.ones_like(x)

    def run() -> None:
        for _ in range(CALLS):
            y = first(x)
            torch.autograd.grad(y if second is None else second(y), wanted, grad)

    return run


def separate(x: Tensor, layers: list[el.ops.Weights]) -> tuple[Tensor, ...]:
    """Layers of one input, one after the other."""
    return tuple(el.ops.linear(structure, factors, x, bias) for structure, factors, bias in layers)


def shared_input(compute: Callable[..., tuple[Tensor, ...]], layers: list[el.Linear], x: Tensor) -> dict[str, Any]:
    """Forward passes, and these with backward passes, of layers of one input."""
    weights = [el.ops.Weights(layer.structure, layer.factors(), layer.bias) for layer in layers]
    wanted = [x.clone().requires_grad_(), *(p for layer in layers for p in layer.parameters())]
    grads = [torch.randn(len(x), layer.out_features) for layer in layers]

    def inference() -> None:
        with torch.no_grad():
            compute(x, weights)

    def training() -> None:
        torch.autograd.grad(compute(wanted[0], weights), wanted, grads)

    return {"inference": inference, "training": training}


def fastest(runs: dict[str, Callable[[], object]], rounds: int, calls: int = CALLS) -> dict[str, float]:
    """Microseconds of a call of each variant, of which a run makes some."""
    times = interleave(runs, "cpu", rounds=rounds, clock=time.process_time)
    return {name: 1e6 * min(seconds) / calls for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, nargs="*", default=[64, 128, 256])
    parser.add_argument("--shared-input", action="store_true", help="three layers of one input")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 128, 512, 2048], help="of these layers")
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.shared_input:
        compare_shared_input(arguments.features, arguments.tokens, arguments.rounds)
        return
    print("| features | structure | pass | two `nn.Linear`, us | `el.Linear`, us | times as long |")
    print("| --- | --- | --- | --- | --- | --- |")
    for d in arguments.features:
        x, two = torch.randn(1, d), (nn.Linear(d, d), nn.Linear(d, d))
        layers = {spec: el.Linear(d, d, spec) for spec in SPECS.replace("{d/8}", str(d // 8)).split("; ")}
        for name, measured in (("inference", inference), ("training", training)):
            runs = {spec: measured(layer, None, x) for spec, layer in layers.items()}
            times = fastest({"two": measured(*two, x), **runs}, arguments.rounds)
            for spec in layers:
                ratio = times[spec] / times["two"]
                print(f"| {d} | `{spec}` | {name} | {times['two']:.1f} | {times[spec]:.1f} | {ratio:.2f} |", flush=True)


def compare_shared_input(features: list[int], tokens: list[int], rounds: int) -> None:
    print("| features | tokens | structure | pass | three calls, us | one call, us | times as fast | runs |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for d, n in itertools.product(features, tokens):
        for spec in SPECS.replace("{d/8}", str(d // 8)).split("; "):
            layers, x = [el.Linear(d, d, spec) for _ in range(3)], torch.randn(n, d)
            apart = shared_input(separate, layers, x)
            together = shared_input(el.ops.shared_input_linear, layers, x)
            for name in apart:
                us = fastest({"apart": apart[name], "together": together[name]}, rounds, 1)
                arguments = layers[0].structure, 3, n, x.dtype, x.device, name == "training"
                why = el.ops.reason_not_to_stack(*arguments)
                row = f"{us['apart']:.0f} | {us['together']:.0f} | {us['apart'] / us['together']:.2f}"
                runs = "stacked" if why is None else "apart"
                print(f"| {d} | {n} | `{spec}` | {name} | {row} | {runs} |", flush=True)


if __name__ == "__main__":
    main()
