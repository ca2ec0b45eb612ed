"""Benchmark cases (a structure at a size, a number of tokens, a pass), suites of cases, and memory traffic."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from einlinear.structures import DoesNotFit, Structure, structure

MODES = ("forward", "train", "decode")
# the most tokens of a decoding step
DECODE_TOKENS = 16
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
DEVICES = ("cpu", "cuda")

_SHARE = re.compile(r"\{d/(\d+)\}")


@dataclass(frozen=True, order=True)
class Case:
    """A structure and a size, a number of input vectors, and a pass.

    The pass is "forward" (no gradients), "train" (forward and backward, gradients of the input and all parameters) or
    "decode" (forward of 1 to 16 tokens), in which weights come from memory if cold, from the caches if not. An empty
    backend is the dispatcher's choice. With an activation the case is a feed-forward block from `in_features` to
    `out_features` hidden ones and back, without one it is a layer.
    """

    structure: str
    in_features: int
    out_features: int
    tokens: int
    mode: str
    dtype: str = "float32"
    device: str = "cpu"
    bias: bool = False
    backend: str = ""
    cold: bool = False
    activation: str = ""
    gated: bool = False

    @property
    def is_block(self) -> bool:
        return bool(self.activation)

    @property
    def dense_macs(self) -> int:
        """MACs of a dense layer or block for one token."""
        return self.in_features * self.out_features * (2 + self.gated if self.is_block else 1)

    @property
    def passes(self) -> int:
        """The number of products of the size of the forward pass: a training step has three."""
        return 3 if self.mode == "train" else 1

    @property
    def size(self) -> str:
        return f"{self.in_features} → {self.out_features}" + (f" → {self.in_features}" if self.is_block else "")

    @property
    def kind(self) -> str:
        """The activation of a block: "gelu", or "gated silu"; empty for a layer."""
        return f"gated {self.activation}" if self.gated else self.activation

    @property
    def amount(self) -> str:
        return f"{self.tokens} token{'' if self.tokens == 1 else 's'}"

    def build(self) -> tuple[Structure, ...]:
        """Build the structure of the layer, or those of all layers of the block: up, then gate, down.

        Raises ValueError if the structure does not exist at a size.
        """
        up = structure(self.structure, self.in_features, self.out_features)
        if not self.is_block:
            return (up,)
        return up, *([up] * self.gated), structure(self.structure, self.out_features, self.in_features)

    def __str__(self) -> str:
        block = f" {self.kind}," if self.is_block else ""
        backend = f", {self.backend}" if self.backend else ""
        cold = " from cold weights" if self.cold else ""
        return f"{self.structure}, {self.size},{block} {self.amount}, {self.mode}{cold}, {self.dtype}{backend}"


@dataclass(frozen=True)
class Traffic:
    """Bytes to move: at least, with written and read intermediates, and the size of the intermediates alone."""

    least: int
    total: int
    intermediates: int


@dataclass(frozen=True)
class BenchConfig:
    """Seconds per case, backends to measure besides the dispatcher's choice (None: all), and whether to compile."""

    budget: float = 1.0
    backends: tuple[str, ...] | None = None
    compiled: bool = False


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A grid of cases and the configuration of their measurement; ``{d/8}`` in a spec is an eighth of the features.

    An input has at most `entries` numbers: larger layers get fewer tokens. Decode passes on a CPU are cold or not.
    With `blocks`, pairs of an activation and whether it is gated, the cases are feed-forward blocks.
    """

    structures: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    modes: tuple[str, ...] = MODES
    dtypes: tuple[str, ...] = ("float32",)
    device: str = "cpu"
    bias: bool = False
    cold: bool = True
    entries: int = 2**40
    blocks: tuple[tuple[str, bool], ...] = ()
    config: BenchConfig = BenchConfig()

    def cases(self) -> list[Case]:
        """Return the grid, structure by structure, without the sizes at which a structure does not exist.

        Raises ValueError for an unknown name, an empty grid, or a structure that exists at no size (`DoesNotFit`).
        """
        check("pass", self.modes, MODES)
        check("dtype", self.dtypes, DTYPES)
        check("device", [self.device], DEVICES)
        if min(self.tokens, default=0) < 1:
            raise ValueError("the numbers of tokens must be positive")
        cases = [
            Case(
                *(spec, *size, tokens, mode, dtype, self.device, self.bias),
                cold=self.cold and mode == "decode" and self.device == "cpu",
                activation=activation,
                gated=gated,
            )
            for template in self.structures
            for spec, size in _resolved(template, self.sizes, bool(self.blocks))
            for activation, gated in self.blocks or (("", False),)
            for dtype in self.dtypes
            for tokens in (min(tokens, max(1, self.entries // max(size))) for tokens in self.tokens)
            for mode in (("decode",) if tokens <= DECODE_TOKENS else ("forward", "train"))
            if mode in self.modes
        ]
        if not cases:
            raise ValueError("nothing to measure: passes with up to 16 tokens are decode, others forward and train")
        return list(dict.fromkeys(cases))


_STRUCTURES = (
    *("btt", "btt(rank=2)", "monarch(blocks=4)", "monarch(blocks=16)"),
    *("low_rank(rank={d/8})", "kronecker", "tt(rank=4)", "dyad(blocks=4)"),
)

SUITES = {
    "quick": Suite(
        structures=("btt", "monarch(blocks=4)", "low_rank(rank={d/8})"),
        sizes=((512, 512),),
        tokens=(1, 256),
        config=BenchConfig(budget=0.2),
    ),
    # Dominated by the overhead of a call. The dispatcher is fitted to this suite and "standard".
    "small": Suite(structures=_STRUCTURES, sizes=((256, 256),), tokens=(1, 32, 256), config=BenchConfig(budget=0.3)),
    # Two CPU cores, about twenty minutes.
    "standard": Suite(
        structures=_STRUCTURES,
        sizes=((512, 512), (1024, 1024), (2048, 2048), (4096, 4096), (1024, 4096), (4096, 1024)),
        tokens=(1, 16, 256, 2048),
        config=BenchConfig(budget=1.5),
    ),
    # What users have. At least a quarter of an hour on two CPU cores; longer where half precision is slow.
    "cpu": Suite(
        structures=("btt", "btt(rank=2)", "monarch(blocks=16)", "low_rank(rank={d/8})", "dyad"),
        sizes=tuple((d, d) for d in (64, 256, 512, 1024, 2048, 4096)),
        tokens=(1, 8, 2048),
        dtypes=tuple(DTYPES),
        entries=2**22,
        config=BenchConfig(budget=0.5, backends=()),
    ),
    # Feed-forward blocks. Two CPU cores, about half an hour.
    "blocks": Suite(
        structures=("btt", "btt(rank=2)", "monarch(blocks=16)", "low_rank(rank={d/8})"),
        sizes=((512, 2048), (1024, 4096), (2048, 8192)),
        tokens=(256, 2048),
        dtypes=("float32", "bfloat16"),
        blocks=(("gelu", False), ("silu", True)),
        config=BenchConfig(budget=1.0, backends=()),
    ),
    # For the coefficients of the cost model (fit_costs.py). Two CPU cores, half a minute.
    "calibration": Suite(
        structures=("btt", "monarch(blocks=4)", "low_rank(rank={d/8})"),
        sizes=((256, 256), (1024, 1024), (2048, 2048)),
        tokens=(1, 32, 512),
        config=BenchConfig(budget=0.05),
    ),
    # One H100 or H200; `tools/gpu_day.sh` measures it in minutes.
    "gpu": Suite(
        structures=("btt", "btt(rank=2)", "monarch(blocks=16)", "low_rank(rank={d/8})", "dyad(blocks=4)"),
        sizes=((1024, 1024), (2048, 2048), (4096, 4096), (8192, 8192)),
        tokens=(16384,),
        dtypes=("bfloat16",),
        device="cuda",
        config=BenchConfig(budget=0.25, compiled=True),
    ),
}


def estimate_traffic(case: Case, *structures: Structure) -> Traffic:
    """Return the traffic of one call of a layer, or of a block of layers.

    Forward reads the input and the factors and writes the output. Backward reads the output's gradient, the input and
    the factors and writes the gradients of input and factors. Forward writes and reads every intermediate, hidden
    features included; backward reads the intermediate, writes its gradient, and reads this twice.
    """
    size = DTYPES[case.dtype].itemsize
    x, y = case.tokens * structures[0].in_features, case.tokens * structures[-1].out_features
    terms = (term for structure in structures for term in structure.terms)
    hidden = sum(structure.out_features for structure in structures[:-1])
    intermediates = case.tokens * (hidden + sum(term.intermediate_size for term in terms))
    times = (3, 2, 3, 6) if case.mode == "train" else (1, 1, 1, 2)
    least = times[0] * x + times[1] * y + times[2] * sum(structure.params for structure in structures)
    return Traffic(size * least, size * (least + times[3] * intermediates), size * intermediates)


def check(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError for an unknown name."""
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}: choose from {', '.join(known)}")


def choose(name: str, **options: Any) -> Suite:
    """Return a suite, with fields of the suite or of its config replaced by all options that are not None."""
    check("suite", [name], SUITES)
    suite = SUITES[name]
    fields = {key: value for key, value in options.items() if value is not None}
    of_config = {f.name for f in dataclasses.fields(BenchConfig)} & fields.keys()
    if "tokens" in fields:
        # as asked for, however large the input
        fields["entries"] = Suite.entries
    config = dataclasses.replace(suite.config, **{key: fields.pop(key) for key in of_config})
    return dataclasses.replace(suite, config=config, **fields)


def _resolved(
    template: str, sizes: Iterable[tuple[int, int]], of_blocks: bool = False
) -> list[tuple[str, tuple[int, int]]]:
    """Return the canonical spec at every size at which the structure exists, of blocks in both directions.

    Raises DoesNotFit if there is none.
    """
    found, misfit = [], None
    for size in sizes:
        spec = _SHARE.sub(partial(_share, min(size)), template)
        try:
            if of_blocks:
                structure(spec, *reversed(size))
            found.append((structure(spec, *size).spec, size))
        except DoesNotFit as error:
            misfit = error
    if misfit and not found:
        raise misfit
    return found


def _share(features: int, match: re.Match[str]) -> str:
    return str(max(1, features // int(match[1])))
