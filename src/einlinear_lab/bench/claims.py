"""The library's claims about speed and memory, as statements that a benchmark confirms or refutes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from einlinear_lab.bench.cases import Case
from einlinear_lab.bench.results import BenchResult
from einlinear_lab.bench.timing import Spread
from einlinear_lab.bench.variants import BLOCK, COMPILED, COPYING, DENSE, OURS, RECOMPUTING


@dataclass(frozen=True)
class Claim:
    """The claim that a value of a result (None if not measured) is at least `least` in all cases that it applies to."""

    text: str
    least: float
    value: Callable[[Any], float | None]
    applies: Callable[[Case], bool]


@dataclass(frozen=True)
class Verdict:
    """A claim and the measured values of all results that it applies to, the worst first."""

    claim: Claim
    values: tuple[tuple[Any, float], ...]

    @property
    def missed(self) -> tuple[tuple[Any, float], ...]:
        """The results that refute the claim."""
        return tuple((result, value) for result, value in self.values if value < self.claim.least)

    @property
    def summary(self) -> str:
        """ "passed", "not measured", or the share by which the worst value misses the promised one."""
        if not self.values:
            return "not measured"
        return f"missed by {1 - self.values[0][1] / self.claim.least:.0%}" if self.missed else "passed"


def judge(results: Sequence[Any], claims: Mapping[str, Sequence[Claim]] | None = None) -> list[Verdict]:
    """Judge the claims (by device; default: those about layers) about the devices of some results."""
    devices = {result.case.device for result in results}
    verdicts = []
    for claim in (claim for device, group in (claims or CLAIMS).items() if device in devices for claim in group):
        values = [(result, claim.value(result)) for result in results if claim.applies(result.case)]
        measured = ((result, value) for result, value in values if value is not None)
        verdicts.append(Verdict(claim, tuple(sorted(measured, key=lambda pair: pair[1]))))
    return verdicts


def where(
    mode: str = "", structure: str = "", least: int = 0, below: int = 2**31, tokens: int = 0, blocks: bool = False
) -> Callable[[Case], bool]:
    """Return the condition on cases: pass, structure, from `least` to `below` features, at least `tokens`, blocks."""
    return lambda case: (
        case.is_block == blocks
        and case.mode == (mode or case.mode)
        and case.structure == (structure or case.structure)
        and least <= min(case.in_features, case.out_features) < below
        and case.tokens >= tokens
    )


def _ratio(result: BenchResult, baseline: str) -> Spread | None:
    """Return the speed-up of our layer or block over dense, over the copying baseline, or over single layers."""
    ours = result.of(result.ours)
    if ours is None:
        return None
    return {DENSE: ours.speedup, COPYING: ours.over_copying, OURS: ours.over_layers}[baseline]


def _speedup(result: BenchResult, baseline: str = DENSE) -> float | None:
    ratio = _ratio(result, baseline)
    return ratio.median if ratio else None


def _over_compiled(result: BenchResult) -> float | None:
    ours, compiled = result.of(OURS), result.of(COMPILED)
    return (
        compiled.seconds.median / ours.seconds.median
        if ours and compiled and ours.seconds and compiled.seconds
        else None
    )


def _not_slower(result: BenchResult, than: str) -> float | None:
    """Return the speed-up, or 1 for a smaller one within the spread."""
    ratio = _ratio(result, than)
    if ratio is None:
        return None
    return max(ratio.median, 1.0) if ratio.high >= 1 else ratio.median


def _memory(result: BenchResult, name: str, intermediates: int) -> float | None:
    """Return the peak memory of dense (plus intermediates) over that of a variant, within a page."""
    variant, dense = result.of(name), result.of(DENSE)
    if not (variant and dense and variant.peak_bytes and dense.peak_bytes):
        return None
    return (dense.peak_bytes + intermediates * result.traffic.intermediates + 4096) / variant.peak_bytes


def _memory_of_layers(result: BenchResult) -> float | None:
    ratio = result.memory_over_layers(BLOCK)
    return 1 / ratio if ratio else None


_LIMIT, _ROOFLINE, _over_copying = (
    BenchResult.fraction,
    BenchResult.roofline_fraction,
    partial(_speedup, baseline=COPYING),
)

# fmt: off
_ALWAYS = (
    Claim("never slower than the copying baseline",
          1.0, lambda r: _not_slower(r, COPYING), where()),
    Claim("never slower than nn.Linear where MACs are at most a quarter of dense and d ≥ 1024",
          1.0, lambda r: _not_slower(r, DENSE) if r.limit >= 4 else None, where(least=1024)),
    Claim("training: peak memory at most that of nn.Linear plus the intermediates",
          1.0, lambda r: _memory(r, OURS, 1), where("train")),
    Claim("training, recomputing: peak memory at most that of nn.Linear",
          1.0, lambda r: _memory(r, RECOMPUTING, 0), where("train")),
    Claim("blocks: never slower than their layers one after the other",
          1.0, lambda r: _not_slower(r, OURS), where(blocks=True)),
    Claim("blocks, training: peak memory at most that of their layers one after the other",
          1.0, _memory_of_layers, where("train", blocks=True)),
)
CLAIMS: dict[str, tuple[Claim, ...]] = {
    "cpu": (
        Claim("forward, 2048 tokens, d ≥ 1024: at least 0.55 of the MAC limit",
              0.55, _LIMIT, where("forward", least=1024, tokens=2048)),
        Claim("forward, 2048 tokens, d = 512: at least 0.45 of the MAC limit",
              0.45, _LIMIT, where("forward", least=512, below=1024, tokens=2048)),
        Claim("training, 2048 tokens, d ≥ 1024: at least 0.45 of the MAC limit",
              0.45, _LIMIT, where("train", least=1024, tokens=2048)),
        Claim("forward, btt, 2048 tokens, d ≥ 1024: at least 2.5 × the copying baseline",
              2.5, _over_copying, where("forward", "btt", least=1024, tokens=2048)),
        Claim("training, btt, 2048 tokens, d ≥ 1024: at least 1.7 × the copying baseline",
              1.7, _over_copying, where("train", "btt", least=1024, tokens=2048)),
        Claim("decode, btt, d = 4096: at least 8 × nn.Linear",
              8.0, _speedup, where("decode", "btt", least=4096)),
        *_ALWAYS,
    ),
    "cuda": (
        Claim("forward, 16,384 tokens: at least 0.5 of the roofline",
              0.5, _ROOFLINE, where("forward", tokens=16384)),
        Claim("training, 16,384 tokens: at least 0.5 of the roofline",
              0.5, _ROOFLINE, where("train", tokens=16384)),
        Claim("forward, btt, d ≥ 4096: at least 3.5 × nn.Linear",
              3.5, _speedup, where("forward", "btt", least=4096)),
        Claim("training, btt, d ≥ 4096: at least 2 × nn.Linear",
              2.0, _speedup, where("train", "btt", least=4096)),
        Claim("btt, d ≥ 4096: at least 1.5 × torch.compile of the plain einsum",
              1.5, _over_compiled, where(structure="btt", least=4096)),
        *_ALWAYS,
    ),
}
# fmt: on
