"""Budget of bytes: every structure, and the dense weight, has candidates in every precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from einlinear import ops
from einlinear.compression.allocation import allocate, least_cost
from einlinear.compression.budget import Budget, Candidates, Choice, Errors, total_change
from einlinear.compression.candidates import LayerCandidate
from einlinear.compression.compression_report import QuantizationAlone
from einlinear.compression.factor_rounding import expanded, round_factors
from einlinear.compression.rounding import nearest_with_least_error
from einlinear.compression.sensitivity import Sensitivity
from einlinear.nn.dense_layers import features, weight_matrix
from einlinear.nn.quantized_linear import BFLOAT16, factor_formats, quantized_bytes
from einlinear.ops.integer_format import IntegerFormat
from einlinear.structures import structure

# each with its error relative to that of the one whose error is measured
PRECISIONS = (BFLOAT16, "int8", "int4(group=64)", "int3(group=64)", "int2(group=64)")
_MEASURED = "int3(group=64)"
# of bfloat16, with 8 bits
_BFLOAT16_ERROR = 2.0**-18


class ByteBudget(Budget):
    """A budget of bytes, with candidates in every precision."""

    count = "bytes"

    @staticmethod
    def check_options(families: Sequence[str], tokens: int | None, only_if_faster: bool) -> None:
        if only_if_faster:
            others = "count='params', 'macs' or 'time'"
            raise ValueError(f"only_if_faster=True needs {others}: with 'bytes' the choice ignores speed")

    def costs(self, name: str) -> dict[str, int]:
        return {s.spec: min(quantized_bytes(s, p) for p in PRECISIONS) for s in self._structures(name)}

    def dense_cost(self, name: str) -> int:
        return weight_bytes(self._layers[name])

    def candidates(self, name: str, errors: Errors, sensitivity: Sensitivity, cached: Callable[..., Any]) -> list[Any]:
        """Return the candidates of a layer, as far as none is both smaller and better, by increasing bytes.

        The errors of rounding are measured for the dense weight and for one low rank, and added to those of structures.
        """
        layer = self._layers[name]
        added = cached("rounding errors", lambda _, moment: rounding_errors(layer, moment), _decode)
        options = [LayerCandidate("dense", self.dense_cost(name), 0.0, 0.0)]
        for s, of_structure in errors:
            for precision, of_rounding in added["dense" if s.spec == "dense" else "factors"].items():
                cost, error = quantized_bytes(s, precision), of_structure + of_rounding
                options.append(LayerCandidate(s.spec, cost, error, sensitivity.at(error), precision))
        front: list[LayerCandidate] = []
        for option in sorted(options, key=lambda option: (option.cost, option.output_change)):
            if not front or option.output_change < front[-1].output_change or option.spec == "dense":
                front.append(option)
        return front

    def alternatives(
        self, candidates: Candidates, chosen: Choice, sensitivities: Mapping[str, Sensitivity]
    ) -> dict[str, Any]:
        dense = {name: [c for c in options if c.spec == "dense"] for name, options in candidates.items()}
        alone = None if least_cost(dense) > self.largest else total_change(allocate(dense, self.largest))
        return {"alternative": QuantizationAlone(total_change(chosen), alone)}

    @property
    def reasons(self) -> dict[str, str]:
        # a layer without any structure is quantised
        return {}


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
        quantized = round_factors(s, factors, formats, weight, moment)
        rounded = [expanded(*part) for part in zip(s.factors, quantized, formats, strict=True)]
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
