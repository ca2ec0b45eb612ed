"""Overhead of a call of small layers, beside two `nn.Linear` of the same size.

    python benchmarks/call_overhead.py

A structured layer has two factors or more, so two dense layers are what its call may cost. One token, float32, one
thread. The variants run in turns, and the table has the fastest of all turns: the rest is what else the machine did.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import einlinear as el

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


def fastest(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Microseconds of a call of each variant."""
    times = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name] = min(times[name], 1e6 * (time.perf_counter() - start) / CALLS)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, nargs="*", default=[64, 128, 256])
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
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


if __name__ == "__main__":
    main()
