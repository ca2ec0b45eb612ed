"""Memory traffic: the bytes that a case has to move, by its shapes."""

from __future__ import annotations

from dataclasses import dataclass

from einlinear.structures import Structure
from einlinear_lab.bench.cases import DTYPES, Case


@dataclass(frozen=True)
class Traffic:
    """Bytes to move. A tensor counts once for every pass that reads it and once for every pass that writes it.

    Attributes:
        least: input, output and factors, and in training their gradients. No implementation moves less.
        total: the same with intermediates, written and read again. Caches may avoid this traffic.
        intermediates: the intermediates once, which a training step may have to keep.
    """

    least: int
    total: int
    intermediates: int


def estimate_traffic(case: Case, structure: Structure) -> Traffic:
    """Return the traffic of one call.

    Forward reads the input and the factors and writes the output. Backward reads the output's gradient, the input and
    the factors and writes the gradients of input and factors. Forward writes and reads every intermediate; backward
    reads the intermediate, writes its gradient, and reads this twice.
    """
    size = DTYPES[case.dtype].itemsize
    x, y = case.tokens * case.in_features, case.tokens * case.out_features
    intermediates = case.tokens * sum(term.intermediate_size for term in structure.terms)
    training = case.mode == "train"
    times = (3, 2, 3, 6) if training else (1, 1, 1, 2)
    least = times[0] * x + times[1] * y + times[2] * structure.params
    return Traffic(size * least, size * (least + times[3] * intermediates), size * intermediates)
