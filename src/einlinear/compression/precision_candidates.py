"""Candidates of a layer under a budget of bytes: every structure, and the dense weight, in every precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from einlinear import ops
from einlinear.compression.candidates import LayerCandidate
from einlinear.compression.factor_rounding import expanded, round_factors
from einlinear.compression.rounding import nearest_with_least_error
from einlinear.compression.sensitivity import Sensitivity
from einlinear.nn.dense_layers import features, weight_matrix
from einlinear.nn.quantized_linear import BFLOAT16, factor_formats, stored_bytes
from einlinear.ops.integer_format import IntegerFormat
from einlinear.structures import Structure, structure

# each with its error relative to that of the one whose error is measured
PRECISIONS = (BFLOAT16, "int8", "int4(group=64)", "int3(group=64)", "int2(group=64)")
_MEASURED = "int3(group=64)"
# of bfloat16, with 8 bits
_BFLOAT16_ERROR = 2.0**-18


def least_bytes(layer: Any, members: Iterable[Structure]) -> int:
    """Return the bytes of the smallest candidate."""
    return min(stored_bytes(s, p) for s in (structure("dense", *features(layer)), *members) for p in PRECISIONS)


def in_every_precision(
    layer: Any, candidates: Sequence[LayerCandidate], sensitivity: Sensitivity, cached: Callable[..., Any]
) -> list[LayerCandidate]:
    """Return the candidates in every precision, as far as none is both smaller and better, by increasing bytes.

    The errors of rounding are measured for the dense weight and for one low rank, and added to those of structures.
    """
    errors = cached("rounding errors", lambda _, moment: rounding_errors(layer, moment), _decode)
    size = features(layer)
    options = [LayerCandidate("dense", weight_bytes(layer), 0.0, 0.0)]
    for candidate in candidates:
        s, kind = structure(candidate.spec, *size), "dense" if candidate.spec == "dense" else "factors"
        for precision in PRECISIONS:
            error = candidate.error + errors[kind][precision]
            cost = stored_bytes(s, precision)
            options.append(LayerCandidate(candidate.spec, cost, error, sensitivity.at(error), precision))
    front: list[LayerCandidate] = []
    for option in sorted(options, key=lambda option: (option.cost, option.output_change)):
        if not front or option.output_change < front[-1].output_change or option.spec == "dense":
            front.append(option)
    return front


def weight_bytes(layer: Any) -> int:
    """Return the bytes of a dense weight."""
    return int(layer.weight.numel() * layer.weight.element_size())


@torch.no_grad()
def rounding_errors(layer: Any, moment: Tensor) -> dict[str, dict[str, float]]:
    """Return relative squared errors that rounding adds, by precision, of a dense weight and of its factors."""
    weight = weight_matrix(layer).detach().float()
    inputs = moment.float()
    variances = inputs.diagonal()
    # of the weight alone
    plain = {p: _plain_error(weight, variances, IntegerFormat.parse(p)) for p in PRECISIONS if p != BFLOAT16}
    errors: dict[str, dict[str, float]] = {}
    half = max(1, round(0.5 * weight.numel() / sum(weight.shape)))
    for kind, spec in (("dense", "dense"), ("factors", f"low_rank(rank={half})")):
        s = structure(spec, *features(layer))
        factors = [weight] if spec == "dense" else ops.project(s, weight, moment)
        formats = factor_formats(s, _MEASURED)
        stored = round_factors(s, factors, formats, weight, moment)
        rounded = [expanded(*part) for part in zip(s.factors, stored, formats, strict=True)]
        added = _error(weight, ops.dense_weight(s, rounded), inputs)
        added -= _error(weight, ops.dense_weight(s, factors), inputs)
        ratio = max(added, 0.0) / max(plain[_MEASURED], 1e-30)
        errors[kind] = {BFLOAT16: _BFLOAT16_ERROR, **{p: ratio * error for p, error in plain.items()}}
    return errors


def _plain_error(weight: Tensor, variances: Tensor, format: IntegerFormat) -> float:
    rounded = format.decode(*nearest_with_least_error(weight, variances, format))
    energy = float((weight.square() * variances).sum())
    return float(((rounded - weight).square() * variances).sum()) / max(energy, 1e-30)


def _error(weight: Tensor, approximation: Tensor, moment: Tensor) -> float:
    difference, energy = approximation - weight, ((weight @ moment) * weight).sum()
    return float(((difference @ moment) * difference).sum() / energy.clamp(min=1e-30))


def _decode(record: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    return {kind: {p: float(record[kind][p]) for p in PRECISIONS} for kind in ("dense", "factors")}
