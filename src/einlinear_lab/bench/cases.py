"""What is measured: a case is a structure at a size, with a number of tokens and a pass; a suite is a grid of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from einlinear.structures import Structure, structure

MODES = ("forward", "train", "decode")
DECODED = 16  # tokens, at most, of a decoding step
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
DEVICES = ("cpu", "cuda")

_SHARE = re.compile(r"\{d/(\d+)\}")


@dataclass(frozen=True, order=True)
class Case:
    """What one row of the results is about.

    Attributes:
        structure: its spec.
        in_features, out_features: of the layer.
        tokens: input vectors.
        mode: "forward" (no gradients), "train" (forward and backward, gradients of the input and of all parameters), or
            "decode" (forward of 1 to 16 tokens).
        dtype, device: of all tensors, such as "float32" and "cpu".
        bias: whether the layers have one.
    """

    structure: str
    in_features: int
    out_features: int
    tokens: int
    mode: str
    dtype: str = "float32"
    device: str = "cpu"
    bias: bool = False

    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates of a dense layer, for one token."""
        return self.in_features * self.out_features

    @property
    def passes(self) -> int:
        """Products of the size of the forward pass: a training step also has the gradients of input and weights."""
        return 3 if self.mode == "train" else 1

    @property
    def size(self) -> str:
        """Such as "1024 → 4096"."""
        return f"{self.in_features} → {self.out_features}"

    def build(self) -> Structure:
        """The structure itself. Raises ValueError where there is none of this size."""
        return structure(self.structure, self.in_features, self.out_features)

    @property
    def amount(self) -> str:
        """Such as "16 tokens"."""
        return f"{self.tokens} token{'' if self.tokens == 1 else 's'}"

    def __str__(self) -> str:
        return f"{self.structure}, {self.size}, {self.amount}, {self.mode}, {self.dtype}"


@dataclass(frozen=True)
class Settings:
    """How cases are measured.

    Attributes:
        budget: seconds to repeat the measurement of a case for; every variant gets at least five runs.
        backends: measured one by one besides the dispatcher's choice; None for all that can run.
        compiled: whether torch.compile of the plain einsum is measured too, in forward and training.
    """

    budget: float = 1.0
    backends: tuple[str, ...] | None = None
    compiled: bool = False


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A grid of cases, and how to measure them.

    Attributes:
        structures: specs; ``{d/8}`` in one stands for an eighth of the smaller feature count.
        sizes: (in_features, out_features) pairs.
        tokens: up to 16 make a "decode" case, more a "forward" and a "train" case.
        modes: those that are wanted.
        dtypes, device, bias: as for `Case`.
        settings: how they are measured.
    """

    structures: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    modes: tuple[str, ...] = MODES
    dtypes: tuple[str, ...] = ("float32",)
    device: str = "cpu"
    bias: bool = False
    settings: Settings = Settings()

    def cases(self) -> list[Case]:
        """The grid, structure by structure.

        Raises:
            ValueError: a structure, pass, dtype or device that there is not; nothing to measure.
        """
        check("pass", self.modes, MODES)
        check("dtype", self.dtypes, DTYPES)
        check("device", [self.device], DEVICES)
        if min(self.tokens, default=0) < 1:
            raise ValueError("the numbers of tokens must be positive")
        found = [
            Case(_resolved(spec, *size), *size, tokens, mode, dtype, self.device, self.bias)
            for spec in self.structures
            for size in self.sizes
            for dtype in self.dtypes
            for tokens in self.tokens
            for mode in (("decode",) if tokens <= DECODED else ("forward", "train"))
            if mode in self.modes
        ]
        if not found:
            raise ValueError("nothing to measure: passes with up to 16 tokens are decode, others forward and train")
        return list(dict.fromkeys(found))


_STRUCTURES = (
    "btt",
    "btt(rank=2)",
    "monarch(blocks=4)",
    "monarch(blocks=16)",
    "low_rank(rank={d/8})",
    "kronecker",
    "tt(rank=4)",
    "dyad(blocks=4)",
)

SUITES = {
    "quick": Suite(
        structures=("btt", "monarch(blocks=4)", "low_rank(rank={d/8})"),
        sizes=((512, 512),),
        tokens=(1, 256),
        settings=Settings(budget=0.2),
    ),
    # Where what a call costs by itself counts most. Together with "standard" it is what the dispatcher is fitted to.
    "small": Suite(
        structures=_STRUCTURES,
        sizes=((256, 256),),
        tokens=(1, 32, 256),
        settings=Settings(budget=0.3),
    ),
    # Two CPU cores, about twenty minutes.
    "standard": Suite(
        structures=_STRUCTURES,
        sizes=((512, 512), (1024, 1024), (2048, 2048), (4096, 4096), (1024, 4096), (4096, 1024)),
        tokens=(1, 16, 256, 2048),
        settings=Settings(budget=1.5),
    ),
    # One H100 or H200, under eight minutes.
    "gpu": Suite(
        structures=_STRUCTURES,
        sizes=((1024, 1024), (2048, 2048), (4096, 4096), (8192, 8192)),
        tokens=(1, 16, 16384),
        dtypes=("bfloat16",),
        device="cuda",
        settings=Settings(budget=0.25, compiled=True),
    ),
}


def check(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError for a name that is none of those known."""
    for name in given:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}: choose from {', '.join(known)}")


def choose(name: str, **options: Any) -> Suite:
    """A suite by its name, with those fields replaced, its own or its settings', that are given and not None.

    Raises:
        ValueError: there is no such suite.
    """
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}: choose from {', '.join(SUITES)}")
    suite = SUITES[name]
    given = {key: value for key, value in options.items() if value is not None}
    of_settings = {f.name for f in dataclasses.fields(Settings)} & given.keys()
    settings = dataclasses.replace(suite.settings, **{key: given.pop(key) for key in of_settings})
    return dataclasses.replace(suite, settings=settings, **given)


def _resolved(spec: str, in_features: int, out_features: int) -> str:
    """The canonical spec at a size."""
    written = _SHARE.sub(lambda match: str(max(1, min(in_features, out_features) // int(match[1]))), spec)
    return structure(written, in_features, out_features).spec
