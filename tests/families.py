"""Example specs of every registered family, and of patterns a user might write: what conformance tests run over.

A new family needs one row in `SAMPLES`.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import einlinear as el
from einlinear.structures import DoesNotFit, Structure

SAMPLES: dict[str, list[str]] = {
    "dense": ["dense"],
    "low_rank": ["low_rank", "low_rank(rank=3)"],
    "kronecker": ["kronecker", "kronecker(split=published)"],
    "tt": ["tt", "tt(rank=3)", "tt(rank=2, cores=3)"],
    "btt": ["btt", "btt(rank=2)", "btt(rank=2, cores=3)", "btt(rank=2, split=published)"],
    "monarch": ["monarch(blocks=2)", "monarch"],
    "dyad": ["dyad", "dyad(blocks=2, variant=ot)", "dyad(variant=dt)"],
    "block_diagonal": ["block_diagonal(blocks=2)", "block_diagonal"],
    "blast": ["blast(blocks=2, rank=3)", "blast(blocks=4, rank=2)"],
    "einsum": [
        "einsum(theta=(1/4, 1/4, 1/2, 1/4, 1/4, 1/2, 1/4))",
        "einsum(theta=(1/2, 1/2, 0, 1/2, 1/2, 0, 0), rank=3)",
    ],
}

PATTERNS: list[str] = [
    "(g a), g r f a, f e g r -> (e f) where g=4, f=2, r=2",  # Monarch with unequal blocks
    "(g a), g r a, g e r -> (g e) where g=2, r=2",  # one low-rank matrix per group: an axis read and written
    "(c b a), c b r f a, c f s h r b, f h i s c -> (f h i) where r=1, s=2",  # three-core BTT
    "i, r i, s r, o s -> o where r=3, s=2",  # a deep low-rank chain
    "i, i, o i -> o",  # a diagonal before a dense factor
    "(n k), n o k -> (n o) + i, r i, p r -> p where n=4, r=2",  # block-diagonal plus low-rank: a multi-factor term
    "(b a), d a, e b -> (e d) + i, i -> i",  # Kronecker plus a diagonal (square only)
]


def structures(spec: str, sizes: Iterable[tuple[int, int]]) -> list[Structure]:
    """The structures at those of the sizes, (in_features, out_features), that the spec fits: at least one."""
    found = []
    for size in sizes:
        with suppress(DoesNotFit):
            found.append(el.structure(spec, *size))
    assert found, f"{spec} fits none of these sizes"
    return found
