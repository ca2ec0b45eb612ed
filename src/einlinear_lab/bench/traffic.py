"""How much memory a case has to move, from its shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

from einlinear.structures import Structure
from einlinear_lab.bench.cases import DTYPES, Case


@dataclass(frozen=True)
class Traffic:
    """Bytes, each tensor counted once per pass that reads and once per pass that writes it.

    Attributes:
        least: the input, the output and the factors, and in training their gradients. No implementation moves less.
        total: also the intermediate states, written and read again; what stays in a cache does not move them.
        states: the intermediate states alone, once: what a training step may have to keep.
    """

    least: int
    total: int
    states: int


def traffic(case: Case, structure: Structure) -> Traffic:
    """The traffic of one call.

    Forward reads the input and the factors and writes the output. Backward reads the output's gradient, the input and
    the factors and writes the gradients of the latter two. Forward writes and reads every intermediate state; backward
    reads it, and writes its gradient and reads it twice.
    """
    size = DTYPES[case.dtype].itemsize
    x, y = case.tokens * case.in_features, case.tokens * case.out_features
    states = case.tokens * sum(term.intermediate_size for term in structure.terms)
    training = case.mode == "train"
    times = (3, 2, 3, 6) if training else (1, 1, 1, 2)
    least = times[0] * x + times[1] * y + times[2] * structure.params
    return Traffic(size * least, size * (least + times[3] * states), size * states)
