"""Report of `adapt` and `load`: every matched layer, adapted or skipped, and the share of trainable parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from einlinear.tables import aligned


@dataclass(frozen=True)
class Adaptation:
    """One adapted layer.

    Attributes:
        name: its first qualified name.
        base: a description of the layer beside the adapter.
        structure: the spec of the adapter.
        params: parameters of the adapter.
        share: these over the entries of the layer's matrix.
    """

    name: str
    base: str
    structure: str
    params: int
    share: float


@dataclass(frozen=True)
class AdaptationReport:
    """Printable report of the layers that got an adapter.

    Attributes:
        adapter: its name.
        adapted: the layers that have it now.
        skipped: matched layers that have not, as (name, reason).
        trainable: the number of parameters of the model that require gradients.
        params: the number of all its parameters, each tied tensor once.
    """

    adapter: str
    adapted: tuple[Adaptation, ...]
    skipped: tuple[tuple[str, str], ...]
    trainable: int
    params: int

    def __str__(self) -> str:
        rows = [("layer", "base", f"adapter {self.adapter!r}", "params", "of the matrix")]
        rows += [(a.name, a.base, a.structure, f"{a.params:,}", f"{a.share:.2%}") for a in self.adapted]
        lines = [*aligned(rows), *(f"skipped {name}: {reason}" for name, reason in self.skipped)]
        share = self.trainable / max(self.params, 1)
        return "\n".join([*lines, f"Trainable: {self.trainable:,} of {self.params:,} parameters ({share:.2%})."])


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of parameters that require gradients, and of all, also if they are partitioned."""
    sizes = [(p.requires_grad, math.prod(getattr(p, "ds_shape", p.shape))) for p in model.parameters()]
    return sum(size for requires_grad, size in sizes if requires_grad), sum(size for _, size in sizes)
