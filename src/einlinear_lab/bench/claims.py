"""What the library promises about speed and memory, as statements that a run confirms or refutes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from einlinear_lab.bench.results import Result
from einlinear_lab.bench.variants import COMPILED, COPYING, DENSE, OURS, RECOMPUTING

Value = Callable[[Result], float | None]
Applies = Callable[[Result], bool]


@dataclass(frozen=True)
class Claim:
    """A statement: of every result that it applies to, this value is at least `least`."""

    text: str
    least: float
    value: Value
    applies: Applies


@dataclass(frozen=True)
class Verdict:
    """What a run says about a claim: the value of every result that it applies to, the worst first."""

    claim: Claim
    values: tuple[tuple[Result, float], ...]

    @property
    def missed(self) -> tuple[tuple[Result, float], ...]:
        """The results that refute it."""
        return tuple((result, value) for result, value in self.values if value < self.claim.least)

    @property
    def summary(self) -> str:
        """Passed or missed, and by how much."""
        if not self.values:
            return "not measured"
        if not self.missed:
            return "passed"
        return f"missed by {1 - self.values[0][1] / self.claim.least:.0%}"


def judge(results: Sequence[Result]) -> list[Verdict]:
    """The verdicts on all claims about the devices that these results are of."""
    devices = {result.case.device for result in results}
    return [_verdict(claim, results) for device in CLAIMS if device in devices for claim in CLAIMS[device]]


def _verdict(claim: Claim, results: Iterable[Result]) -> Verdict:
    found = [(result, claim.value(result)) for result in results if claim.applies(result)]
    return Verdict(claim, tuple(sorted(((r, v) for r, v in found if v is not None), key=lambda pair: pair[1])))


def _where(mode: str = "", structure: str = "", least: int = 0, below: int = 2**31, tokens: int = 0) -> Applies:
    """Whether a result is of this pass and structure, has from `least` to `below` features, and at least `tokens`."""

    def applies(result: Result) -> bool:
        case = result.case
        return (
            case.mode == (mode or case.mode)
            and case.structure == (structure or case.structure)
            and least <= min(case.in_features, case.out_features) < below
            and case.tokens >= tokens
        )

    return applies


def _thrifty(result: Result) -> bool:
    """At most a quarter of the MACs of dense, from 1024 features on."""
    return result.limit >= 4 and _where(least=1024)(result)


def _speedup(result: Result) -> float | None:
    found = result.of(OURS)
    return found.speedup.median if found and found.speedup else None


def _over_copying(result: Result) -> float | None:
    found = result.of(OURS)
    return found.over_copying.median if found and found.over_copying else None


def _over_compiled(result: Result) -> float | None:
    ours, compiled = result.of(OURS), result.of(COMPILED)
    if not (ours and compiled and ours.seconds and compiled.seconds):
        return None
    return compiled.seconds.median / ours.seconds.median


def _not_slower(result: Result, than: str) -> float | None:
    """The speed-up, or 1 where it is less but not beyond the spread."""
    found = result.of(OURS)
    ratio = None if found is None else found.speedup if than == DENSE else found.over_copying
    if ratio is None:
        return None
    return max(ratio.median, 1.0) if ratio.high >= 1 else ratio.median


def _memory(result: Result, name: str, states: int) -> float | None:
    """The peak memory of dense plus `states` times the intermediate states, over that of a variant, within a page."""
    ours, dense = result.of(name), result.of(DENSE)
    if not (ours and dense and ours.peak_bytes and dense.peak_bytes):
        return None
    return (dense.peak_bytes + states * result.traffic.states + 4096) / ours.peak_bytes


_ALWAYS = (
    Claim("never slower than the copying baseline", 1.0, lambda r: _not_slower(r, COPYING), lambda r: True),
    Claim(
        "never slower than nn.Linear where MACs are at most a quarter of dense and d ≥ 1024",
        1.0,
        lambda r: _not_slower(r, DENSE),
        _thrifty,
    ),
    Claim(
        "training: peak memory at most that of nn.Linear plus the intermediate states",
        1.0,
        lambda r: _memory(r, OURS, 1),
        _where("train"),
    ),
    Claim(
        "training, recomputing: peak memory at most that of nn.Linear",
        1.0,
        lambda r: _memory(r, RECOMPUTING, 0),
        _where("train"),
    ),
)

CLAIMS: dict[str, tuple[Claim, ...]] = {
    "cpu": (
        Claim(
            "forward, 2048 tokens, d ≥ 1024: at least 0.55 of the MAC limit",
            0.55,
            Result.fraction,
            _where("forward", least=1024, tokens=2048),
        ),
        Claim(
            "forward, 2048 tokens, d = 512: at least 0.45 of the MAC limit",
            0.45,
            Result.fraction,
            _where("forward", least=512, below=1024, tokens=2048),
        ),
        Claim(
            "training, 2048 tokens, d ≥ 1024: at least 0.45 of the MAC limit",
            0.45,
            Result.fraction,
            _where("train", least=1024, tokens=2048),
        ),
        Claim(
            "forward, btt, 2048 tokens, d ≥ 1024: at least 2.5 × the copying baseline",
            2.5,
            _over_copying,
            _where("forward", "btt", least=1024, tokens=2048),
        ),
        Claim(
            "training, btt, 2048 tokens, d ≥ 1024: at least 1.7 × the copying baseline",
            1.7,
            _over_copying,
            _where("train", "btt", least=1024, tokens=2048),
        ),
        Claim("decode, btt, d = 4096: at least 8 × nn.Linear", 8.0, _speedup, _where("decode", "btt", least=4096)),
        *_ALWAYS,
    ),
    "cuda": (
        Claim(
            "forward, 16,384 tokens: at least 0.5 of the roofline",
            0.5,
            Result.of_roof,
            _where("forward", tokens=16384),
        ),
        Claim(
            "training, 16,384 tokens: at least 0.5 of the roofline", 0.5, Result.of_roof, _where("train", tokens=16384)
        ),
        Claim("forward, btt, d ≥ 4096: at least 3.5 × nn.Linear", 3.5, _speedup, _where("forward", "btt", least=4096)),
        Claim("training, btt, d ≥ 4096: at least 2 × nn.Linear", 2.0, _speedup, _where("train", "btt", least=4096)),
        Claim(
            "btt, d ≥ 4096: at least 1.5 × torch.compile of the plain einsum",
            1.5,
            _over_compiled,
            _where(structure="btt", least=4096),
        ),
        *_ALWAYS,
    ),
}
