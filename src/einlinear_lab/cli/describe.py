"""`einlinear describe`: its options, and what it prints."""

from __future__ import annotations

from itertools import chain
from typing import Annotated

import torch
import typer

import einlinear
from einlinear import ops
from einlinear.mup.factor_multipliers import adam_multipliers
from einlinear.ops.batched.matmul_plan import matmul_steps
from einlinear.structures import DoesNotFit, Structure
from einlinear.structures.initialization import init_std
from einlinear.structures.sharding import shard
from einlinear_lab.cli import display


def describe_command(
    spec: str,
    in_features: int,
    out_features: int,
    max_macs: float | None = None,
    plan: Annotated[bool, typer.Option("--plan")] = False,
    tokens: Annotated[int, typer.Option(min=1)] = 2048,
    sharding: Annotated[bool, typer.Option("--sharding")] = False,
    devices: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Show a structure's factors, parameters, MACs, rank and exponents at one size, next to dense.

    Args:
        spec: A structure, such as "btt(rank=2)", or a pattern, such as "i, r i, o r -> o where r=8".
        in_features: Input features of the layer.
        out_features: Output features of the layer.
        max_macs: Choose the largest rank, or the fewest blocks, within this fraction of the MACs of dense.
        plan: Also say how it is run on this machine's CPU.
        tokens: For --plan: input vectors at a time.
        sharding: Also say how devices share it in tensor parallelism.
        devices: For --sharding: their number.
    """
    with display.user_errors():
        structure = einlinear.structure(spec, in_features, out_features, max_macs=max_macs)
    _print_structure(structure)
    if plan:
        device = torch.device("cpu")
        display.note(f"\nBackend for {tokens:,} inputs of float32 on this CPU, and the estimated time of the others:")
        display.note(str(ops.choose(structure, tokens, torch.float32, device)))
        display.note("\nBatched matmuls and the intermediates between them, slowest axis first:")
        for step in chain.from_iterable(matmul_steps(structure)):
            display.note(f"  {structure.factors[step.index].name}  {step}")
    if sharding:
        _print_sharding(structure, devices)


def _print_structure(s: Structure) -> None:
    dense = einlinear.structure("dense", s.in_features, s.out_features)
    display.note(f"{s}\npattern  {s.pattern}")
    display.note(f"sizes    {', '.join(f'{axis}={size}' for axis, size in s.sizes)}\n")

    factors = []
    for factor, std, multiplier in zip(s.factors, init_std(s), adam_multipliers(s), strict=True):
        shape = "×".join(map(str, factor.shape))
        counts = (factor.fan_in, factor.fan_out, factor.params, factor.macs)
        numbers = (*(f"{n:,}" for n in counts), f"{std:.4g}", f"{multiplier:.4g}×")
        factors.append((factor.name, " ".join(factor.axes), shape, *numbers))
    display.show(("factor", "axes", "shape", "fan in", "fan out", "params", "MACs", "init std", "Adam lr"), factors)
    display.note("Factors in order of contraction. Adam lr: relative to a dense layer of the same size.\n")

    totals = []
    for name in ("params", "macs", "rank"):
        own, full = getattr(s, name), getattr(dense, name)
        totals.append(("MACs" if name == "macs" else name, f"{own:,}", f"{full:,}", f"{own / full:.4g}"))
    for name, meaning in (("psi", "rank = n^psi"), ("nu", "MACs = n^(1+nu)"), ("omega", "params / MACs = n^-omega")):
        totals.append((f"{name}  ({meaning})", f"{getattr(s, name):.4g}", f"{getattr(dense, name):.4g}", ""))
    display.show(("", "this", "dense", "ratio"), totals)


def _print_sharding(s: Structure, devices: int) -> None:
    display.note(f"\nTensor parallelism over {devices} devices:")
    rows, errors = [], []
    for style, side, direction in (("Colwise", "out", "backward"), ("Rowwise", "in", "forward")):
        axis = s.sharding(side)
        try:
            split = shard(s, side, devices)
        except DoesNotFit as error:
            errors.append(f"{style}: {error}")
            continue
        names = [
            factor.name if axis is None else f"{factor.name} ({axis})" for factor, axis in zip(s.factors, split.axes)
        ]
        sharded = " ".join(name for name, axis in zip(names, split.axes) if axis is not None)
        replicated = " ".join(name for name, axis in zip(names, split.axes) if axis is None) or "–"
        summed = " + ".join(f"{features:,}" for features in split.all_reduces)
        gradients = sum(s.factors[i].params for i in split.summed)
        share = f"{split.macs / s.macs:.0%}"
        rows.append((style, axis or "–", sharded, replicated, share, f"{summed}, {direction}", f"{gradients:,}"))
    if rows:
        header = (
            "style",
            "common axis",
            "sharded",
            "replicated",
            "MACs per device",
            "all-reduced per input",
            "per step",
        )
        display.show(header, rows)
        display.note(
            "Devices have consecutive features, so factors are sharded along the slowest axis. Common axis: one that "
            "all factors with axes of the side have. Per step: gradients of replicated factors, all-reduced."
        )
    for message in errors:
        display.note(message)
