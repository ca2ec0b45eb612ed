"""Mixtures of experts beside what does the same work without a router, and beside computing all experts.

    el.MoELinear, E experts    ours: router, choice, and the products of the active experts
    rank ACTIVE                a layer without a router that has the active MACs: as fast as a mixture could be
    all experts, masked        the published way: the products of all experts, times a gate that is zero for most
    all experts                those products without router and gate, as one layer: less than any masking can take

All are timed in turns, those of different numbers of experts as well, so that ratios are of the same rounds.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from einlinear.files import write_text
from einlinear.nn import Linear, MoELinear
from einlinear.ops import Assignment, linear
from einlinear.ops.backends import BACKENDS
from einlinear.ops.context import backend
from einlinear_lab.bench.cases import DEVICES, DTYPES, check
from einlinear_lab.bench.machine import Machine
from einlinear_lab.bench.tables import Table, number
from einlinear_lab.bench.timing import Spread, interleave, spread

EXPERTS = (8, 16, 32, 64)
COMPARED = 16  # experts, where mixtures are compared with something else
ACTIVE = 2
SIZES = ((1024, 1024), (2048, 2048))
TOKENS = 2048
LEAST = 1024  # features and tokens that claims are about
MODES = ("forward", "train")
FILE = "moe.json"
_CACHED = 256  # tokens whose states of all experts stay in a CPU's cache

RANK, MASKED, ALL = f"rank {ACTIVE}", "all experts, masked", "all experts"


@dataclass(frozen=True)
class Case:
    """BTT experts of one size in one pass, "forward" or "train"."""

    in_features: int
    out_features: int
    tokens: int
    mode: str
    dtype: str = "float32"
    device: str = "cpu"
    backend: str | None = None  # None: the dispatcher's choice

    def __str__(self) -> str:
        usual = {"float32", "cpu", None}
        unusual = [f", {own}" for own in (self.dtype, self.device, self.backend) if own not in usual]
        return f"btt, {self.in_features} → {self.out_features}, {self.tokens} tokens, {self.mode}{''.join(unusual)}"


@dataclass(frozen=True)
class Claim:
    """A ratio of the times of two variants that is at most this, from 1024 features and tokens on."""

    text: str
    variant: str
    over: str
    most: dict[str, float]  # by pass


def ours(experts: int) -> str:
    """The name of a mixture."""
    return f"el.MoELinear, {experts} experts"


CLAIMS = (
    Claim("at most 2.2 times a layer of the active rank", ours(COMPARED), RANK, {"forward": 2.2}),
    Claim("at least 3 times (training: 2.5) as fast as all experts, masked", ours(COMPARED), MASKED,
          {"forward": 1 / 3, "train": 1 / 2.5}),
    Claim("64 experts take at most 1.5 times as long as 8", ours(64), ours(8), {"forward": 1.5, "train": 1.5}),
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """Of a case: the seconds of every variant, and the ratios of those that claims are about."""

    case: Case
    seconds: dict[str, Spread]
    ratios: dict[str, dict[str, Spread]]


def cases(
    sizes: Iterable[tuple[int, int]] | None = None,
    tokens: Sequence[int] | None = None,
    modes: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    device: str | None = None,
    backends: Sequence[str] | None = None,
) -> list[Case]:
    """The grid; of every backend by itself, where some are given. Raises ValueError for what there is not."""
    check("pass", modes or (), MODES)
    check("dtype", dtypes or (), DTYPES)
    check("device", [device or DEVICES[0]], DEVICES)
    check("backend", backends or (), BACKENDS)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here")
    return [
        Case(*size, count, mode, dtype, device or DEVICES[0], backend)
        for size in sizes or SIZES
        for count in tokens or (TOKENS,)
        for mode in modes or MODES
        for dtype in dtypes or ("float32",)
        for backend in backends or (None,)
    ]


def measure(case: Case, budget: float) -> Result:
    """Time all variants of a case in turns.

    Raises:
        RuntimeError: a mixture computes something else than plain einsum in float64, or its masked counterpart
            something else than the mixture; or the backend cannot run here.
    """
    with backend(case.backend):
        return _measure(case, budget)


def _measure(case: Case, budget: float) -> Result:
    torch.manual_seed(0)
    where: dict[str, Any] = {"device": case.device, "dtype": DTYPES[case.dtype]}
    calls: dict[str, Callable[[], object]] = {}
    size = (case.in_features, case.out_features)
    x = torch.randn(case.tokens, case.in_features, **where, requires_grad=case.mode == "train")
    grad = torch.randn(case.tokens, case.out_features, **where)

    def add(name: str, run: Callable[[Tensor], Tensor], weights: Iterable[Tensor]) -> None:
        leaves = [x, *weights]

        def step() -> object:
            if case.mode == "train":
                return torch.autograd.grad(run(x), leaves, grad)
            with torch.no_grad():
                return run(x)

        calls[name] = step

    for experts in EXPERTS:
        mixture = MoELinear(*size, "btt", experts, ACTIVE, bias=False, **where)
        nn.init.normal_(mixture.router, std=case.in_features**-0.5)
        add(ours(experts), mixture, mixture.parameters())
        _check(mixture, x, grad, case.mode == "train")
        if experts == COMPARED:
            all_of_them = MaskedExperts(mixture)
            with torch.no_grad():
                _compare(MASKED, [all_of_them(x)], [mixture(x)], x.dtype)
            add(MASKED, all_of_them, mixture.parameters())
    for name, rank in ((RANK, ACTIVE), (ALL, COMPARED)):
        layer = Linear(*size, f"btt(rank={rank})", bias=False, **where)
        add(name, layer, layer.parameters())
    for call in calls.values():
        call()
    found = interleave(calls, case.device, budget)
    ratios: dict[str, dict[str, Spread]] = {}
    for a, b in {(ours(COMPARED), over) for over in (RANK, MASKED, ALL)} | {(c.variant, c.over) for c in CLAIMS}:
        ratios.setdefault(a, {})[b] = spread([mine / theirs for mine, theirs in zip(found[a], found[b], strict=True)])
    return Result(case, {name: spread(own) for name, own in found.items()}, ratios)


class MaskedExperts(nn.Module):
    """The mixture as it is published: all experts of a BTT at once, as slices of its rank, times a gate that is zero
    for most of them. Better than published: neither product copies the state between them, and it stays in cache.

    Args:
        mixture: of rank-1 BTT experts whose sizes need no padding.
    """

    def __init__(self, mixture: MoELinear) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._some(part) for part in x.split(_CACHED)]) if x.is_cpu else self._some(x)

    def _some(self, x: Tensor) -> Tensor:
        routing = self.mixture.route(x)
        gates = torch.zeros_like(routing.logits).scatter(1, routing.indices, routing.gates)
        a, b = self.mixture.factors()  # (r, g, 1, f, a) and (r, f, e, g, 1), where r are the experts
        experts, groups, _, outer, inner = a.shape
        first = a.permute(1, 0, 2, 3, 4).reshape(groups, experts * outer, inner)
        second = b.permute(1, 2, 3, 0, 4).reshape(outer, -1, groups * experts)
        z = first @ x.view(-1, groups, inner).permute(1, 2, 0)  # (g, r f, tokens)
        z = z.view(groups, experts, outer, -1) * gates.T[:, None].to(z.dtype)
        y = second @ z.permute(2, 0, 1, 3).flatten(1, 2)  # (f, e, tokens)
        return y.permute(2, 0, 1).reshape(len(x), -1)


def _check(mixture: MoELinear, x: Tensor, grad: Tensor, train: bool) -> None:
    """Compare outputs and, in training, gradients with plain einsum in float64, for some tokens."""
    x, grad = x.detach()[:_CACHED], grad[:_CACHED]
    with torch.no_grad():
        indices, gates, _ = mixture.route(x)

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_(train) for t in (x, gates, *mixture.factors())]
        y = linear(mixture.structure, leaves[2:], leaves[0], routing=Assignment(indices, leaves[1]))
        return [y.detach(), *(torch.autograd.grad(y, leaves, grad.to(dtype)) if train else ())]

    with backend("reference"):
        exact = run(torch.float64)
    _compare(ours(mixture.experts), run(x.dtype), exact, x.dtype)


def _compare(name: str, found: Sequence[Tensor], wanted: Sequence[Tensor], dtype: torch.dtype) -> None:
    for mine, right in zip(found, wanted, strict=True):
        off = float(torch.linalg.norm(mine.double() - right) / torch.linalg.norm(right.double()))
        if not off < (1e-5 if dtype == torch.float32 else 0.02):
            raise RuntimeError(f"{name} is off by {off:.1e} of its size")


def write(machine: Machine, command: str, results: Sequence[Result], folder: Path) -> None:
    """moe.json, all of it, and moe.md, the tables."""
    head = {"machine": dataclasses.asdict(machine), "command": command}
    content = head | {"results": [dataclasses.asdict(result) for result in results]}
    write_text(folder / FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    parts = ["# Mixtures of experts", str(machine), f"    {command}"]
    parts += [table.markdown() for table in (conclusions(results), times(results))]
    write_text(folder / "moe.md", "\n\n".join(parts) + "\n")


def times(results: Iterable[Result]) -> Table:
    """A row per variant."""
    rows = []
    for result in results:
        for name, seconds in result.seconds.items():
            ratio = result.ratios[ours(COMPARED)].get(name)
            low, high = 1000 * seconds.low, 1000 * seconds.high
            milliseconds = f"{number(1000 * seconds.median)} ({number(low)} to {number(high)})"
            rows.append((str(result.case), name, milliseconds, number(ratio.median if ratio else None)))
    headings = ("case", "variant", "ms (quartiles)", f"{ours(COMPARED)}, × this")
    return Table(f"Times, {ACTIVE} experts active", headings, tuple(rows))


def conclusions(results: Iterable[Result]) -> Table:
    """A row per claim and case."""
    rows = []
    for result in results:
        for claim in CLAIMS:
            case = result.case
            most = claim.most.get(case.mode)
            if (
                case.device == "cpu"
                and most is not None
                and min(case.in_features, case.out_features, case.tokens) >= LEAST
            ):
                found = result.ratios[claim.variant][claim.over].median
                verdict = "passed" if found <= most else f"missed by {found / most - 1:.0%}"
                shown = f"{number(found)} ≤ {number(most)}" if found <= most else f"{number(found)} > {number(most)}"
                rows.append((verdict, claim.text, str(case), shown))
    return Table("Conclusions", ("verdict", "claim", "case", "ratio of times"), tuple(rows))
