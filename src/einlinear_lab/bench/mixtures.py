"""Benchmark of mixtures of experts: against a layer of the active MACs, and against computing all experts.

el.MoELinear, E experts    this library: router, gates, and the products of the active experts
rank ACTIVE                a layer without a router that has the active MACs: a lower bound on the time of a mixture
all experts, masked        the published method: the products of all experts, times a gate that is mostly zero
all experts                these products without router and gate, as one layer: a lower bound on any masking
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from einlinear.nn import Linear, MoELinear
from einlinear.ops import Routing, linear
from einlinear.ops.backends import BACKENDS
from einlinear.ops.context import backend
from einlinear_lab.bench.cases import DEVICES, DTYPES, Case, check
from einlinear_lab.bench.claims import Claim, judge, where
from einlinear_lab.bench.tables import Table, conclusions, misses, number
from einlinear_lab.bench.timing import Spread, interleave, spread

# the number of experts of all mixtures, of the one in comparisons, and the active ones
EXPERTS, COMPARED, ACTIVE = (8, 16, 32, 64), 16, 2
SIZES, TOKENS, MODES = ((1024, 1024), (2048, 2048)), 2048, ("forward", "train")
# tokens whose intermediates of all experts fit into a CPU cache
_CACHED = 256

RANK, MASKED, ALL = f"rank {ACTIVE}", "all experts, masked", "all experts"


@dataclass(frozen=True)
class MixtureResult:
    """The times of a call of all variants of a case, and the ratios (variant -> other variant -> ratio) of some."""

    case: Case
    seconds: dict[str, Spread]
    ratios: dict[str, dict[str, Spread]]


def ours(experts: int) -> str:
    return f"el.MoELinear, {experts} experts"


def _faster(variant: str, over: str) -> Callable[[MixtureResult], float]:
    """Return the function result -> speed-up of a variant over another one."""
    return lambda result: 1 / result.ratios[variant][over].median


_large = partial(where, least=1024, tokens=1024)

# fmt: off
CLAIMS = {"cpu": (
    Claim("forward: at most 2.2 times the time of a layer of the active rank",
          1 / 2.2, _faster(ours(COMPARED), RANK), _large("forward")),
    Claim("forward: at least 3 times as fast as all experts, masked",
          3.0, _faster(ours(COMPARED), MASKED), _large("forward")),
    Claim("training: at least 2.5 times as fast as all experts, masked",
          2.5, _faster(ours(COMPARED), MASKED), _large("train")),
    Claim("64 experts take at most 1.5 times as long as 8",
          1 / 1.5, _faster(ours(64), ours(8)), _large("")),
)}
# fmt: on
_RATIOS = {ours(COMPARED): (RANK, MASKED, ALL), ours(64): (ours(8),)}


@dataclass(frozen=True)
class MixtureBenchmark:
    """The benchmark of mixtures: the options of its grid, in which every backend is a case if some are given.

    Raises ValueError for unknown names.
    """

    FILE: ClassVar[str] = "moe.json"
    TITLE: ClassVar[str] = "Mixtures of experts"

    sizes: Sequence[tuple[int, int]] = SIZES
    tokens: Sequence[int] = (TOKENS,)
    modes: Sequence[str] = MODES
    dtypes: Sequence[str] = ("float32",)
    device: str = "cpu"
    backends: Sequence[str] = ("",)
    budget: float = 10.0

    def __post_init__(self) -> None:
        check("pass", self.modes, MODES)
        check("dtype", self.dtypes, DTYPES)
        check("device", [self.device], DEVICES)
        check("backend", filter(None, self.backends), BACKENDS)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device here")

    def cases(self) -> list[Case]:
        grid = product(self.sizes, self.tokens, self.modes, self.dtypes, self.backends)
        return [
            Case("btt", *size, count, mode, dtype, self.device, backend=backend)
            for size, count, mode, dtype, backend in grid
        ]

    def measure(self, case: Case) -> MixtureResult:
        return measure(case, self.budget)

    def tables(self, results: Sequence[MixtureResult]) -> list[Table]:
        return tables(results)


def measure(case: Case, budget: float) -> MixtureResult:
    """Time all variants of a case in interleaved rounds. Raises RuntimeError if an output is wrong, or nothing runs."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": case.device, "dtype": DTYPES[case.dtype]}
    modules: dict[str, nn.Module] = {}
    training, size = case.mode == "train", (case.in_features, case.out_features)
    x = torch.randn(case.tokens, case.in_features, **options, requires_grad=training)
    grad = torch.randn(case.tokens, case.out_features, **options)

    def step(module: nn.Module) -> object:
        with torch.set_grad_enabled(training):
            y = module(x)
        return torch.autograd.grad(y, [x, *module.parameters()], grad) if training else y

    with backend(case.backend or None):
        for experts in EXPERTS:
            mixture = MoELinear(*size, "btt", experts, ACTIVE, bias=False, **options)
            nn.init.normal_(mixture.router, std=case.in_features**-0.5)
            modules[ours(experts)] = mixture
            check_mixture(mixture, x, grad, training)
            if experts == COMPARED:
                modules[MASKED] = MaskedExperts(mixture)
                with torch.no_grad():
                    _compare(MASKED, [modules[MASKED](x)], [mixture(x)], x.dtype)
        for name, rank in ((RANK, ACTIVE), (ALL, COMPARED)):
            modules[name] = Linear(*size, f"btt(rank={rank})", bias=False, **options)
        calls = {name: partial(step, module) for name, module in modules.items()}
        for call in calls.values():
            call()
        seconds = interleave(calls, case.device, budget)
    ratios = {
        name: {other: spread([a / b for a, b in zip(seconds[name], seconds[other], strict=True)]) for other in others}
        for name, others in _RATIOS.items()
    }
    return MixtureResult(case, {name: spread(times) for name, times in seconds.items()}, ratios)


class MaskedExperts(nn.Module):
    """The published mixture: all rank-1 BTT experts at once, as slices of the rank, times a gate that is mostly zero.

    It is faster than the published code, as the intermediate stays in cache. The sizes must need no padding.
    """

    def __init__(self, mixture: MoELinear) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._chunk(part) for part in x.split(_CACHED)]) if x.is_cpu else self._chunk(x)

    def _chunk(self, x: Tensor) -> Tensor:
        routing = self.mixture.route(x)
        gates = torch.zeros_like(routing.logits).scatter(1, routing.indices, routing.gates)
        # (r, g, 1, f, a) and (r, f, e, g, 1), where r are the experts
        a, b = self.mixture.factors()
        experts, groups, _, outer, inner = a.shape
        first = a.permute(1, 0, 2, 3, 4).reshape(groups, experts * outer, inner)
        second = b.permute(1, 2, 3, 0, 4).reshape(outer, -1, groups * experts)
        z = first @ x.view(-1, groups, inner).permute(1, 2, 0)  # (g, r f, tokens)
        z = z.view(groups, experts, outer, -1) * gates.T[:, None].to(z.dtype)
        y = second @ z.permute(2, 0, 1, 3).flatten(1, 2)  # (f, e, tokens)
        return y.permute(2, 0, 1).reshape(len(x), -1)


def check_mixture(mixture: MoELinear, x: Tensor, grad: Tensor, train: bool) -> None:
    """Compare outputs and, in training, gradients of some tokens with plain einsum in float64."""
    x, grad = x.detach()[:_CACHED], grad[:_CACHED]
    with torch.no_grad():
        indices, gates, _ = mixture.route(x)

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_(train) for t in (x, gates, *mixture.factors())]
        y = linear(mixture.structure, leaves[2:], leaves[0], routing=Routing(indices, leaves[1]))
        return [y.detach(), *(torch.autograd.grad(y, leaves, grad.to(dtype)) if train else ())]

    with backend("reference"):
        exact = run(torch.float64)
    _compare(ours(mixture.experts), run(x.dtype), exact, x.dtype)


def _compare(name: str, outputs: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> None:
    for output, reference in zip(outputs, expected, strict=True):
        error = float(torch.linalg.norm(output.double() - reference) / torch.linalg.norm(reference.double()))
        if not error < (1e-5 if dtype == torch.float32 else 0.02):
            raise RuntimeError(f"{name} has a relative error of {error:.1e}")


def tables(results: Sequence[MixtureResult]) -> list[Table]:
    """Return the verdicts on the claims, the results that refute them, and the times of all variants."""
    verdicts = [verdict for verdict in judge(results, CLAIMS) if verdict.values]
    rows = []
    for result in results:
        for name, seconds in result.seconds.items():
            ratio = result.ratios[ours(COMPARED)].get(name)
            median, low, high = (number(1000 * value) for value in vars(seconds).values())
            rows.append((str(result.case), name, f"{median} ({low} to {high})", number(ratio)))
    headings = ("case", "variant", "ms (quartiles)", f"{ours(COMPARED)}, × this")
    return [conclusions(verdicts), misses(verdicts), Table(f"Times, {ACTIVE} experts active", headings, tuple(rows))]
