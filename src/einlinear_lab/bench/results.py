"""The results of a benchmark, and their file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from einlinear.files import differences, write_text
from einlinear_lab.bench.cases import DTYPES, BenchConfig, Case, Traffic
from einlinear_lab.bench.machine import Machine, Roofline
from einlinear_lab.bench.timing import Spread
from einlinear_lab.bench.variants import BLOCK, DENSE, OURS

# of the file; raised when an older program could misread it
FORMAT = 2


@dataclass(frozen=True)
class Measurement:
    """Time of a call, speed-ups of the same rounds, and peak memory of a variant, or why it was refused or is wrong."""

    name: str
    refusal: str | None = None
    wrong: bool = False
    seconds: Spread | None = None
    runs: int = 0
    speedup: Spread | None = None
    over_copying: Spread | None = None
    # of a block, over el.Linear one after the other
    over_layers: Spread | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class BenchResult:
    """The result of a case: MACs per token, the chosen backend, the least time at measured peaks, all variants.

    The backend of a block is "fused" or "layer by layer".
    With cold weights also the bytes of the stack of layers, and the bytes per second of plain reads.
    """

    case: Case
    macs: int
    backend: str
    traffic: Traffic
    roofline_seconds: float
    measurements: tuple[Measurement, ...]
    stack_bytes: int | None = None
    read_bandwidth: float | None = None

    @property
    def limit(self) -> float:
        """The MACs of dense over those of the structure: the speed-up that MACs alone allow."""
        return self.case.dense_macs / self.macs

    @property
    def ours(self) -> str:
        """The variant that users get: el.Linear, or el.FeedForward."""
        return BLOCK if self.case.is_block else OURS

    def of(self, name: str) -> Measurement | None:
        """Return the measurement of a variant, or None if it was not timed."""
        return next((m for m in self.measurements if m.name == name and m.seconds), None)

    def fraction(self, name: str | None = None) -> float | None:
        """Return the speed-up over dense as a share of `limit`, by default of `ours`."""
        m = self.of(name or self.ours)
        return m.speedup.median / self.limit if m and m.speedup else None

    def roofline_fraction(self, name: str = OURS) -> float | None:
        """Return the share of the machine's measured peak of arithmetic or of memory, whichever is the bottleneck."""
        m = self.of(name)
        return self.roofline_seconds / m.seconds.median if m and m.seconds else None

    def bandwidth(self, name: str = OURS) -> float | None:
        """Return the bytes per second, if all of the estimated traffic went through memory."""
        m = self.of(name)
        return self.traffic.total / m.seconds.median if m and m.seconds else None

    def weight_bandwidth(self, name: str = OURS) -> float | None:
        """Return the bytes of the weights per second."""
        m = self.of(name)
        params = self.case.dense_macs if name == DENSE else sum(structure.params for structure in self.case.build())
        return params * DTYPES[self.case.dtype].itemsize / m.seconds.median if m and m.seconds else None

    def read_fraction(self, name: str = OURS) -> float | None:
        """Return `weight_bandwidth` as a share of that of plain reads, for cold weights."""
        bandwidth = self.weight_bandwidth(name)
        return bandwidth / self.read_bandwidth if bandwidth and self.read_bandwidth else None

    def memory_over_layers(self, name: str) -> float | None:
        """Return the peak memory of a variant of a block over that of el.Linear, one layer after the other."""
        m, layers = self.of(name), self.of(OURS)
        return m.peak_bytes / layers.peak_bytes if m and layers and m.peak_bytes and layers.peak_bytes else None

    @property
    def dense_wins(self) -> bool:
        """Whether nn.Linear is faster than our layer or block, beyond the spread."""
        ours = self.of(self.ours)
        return ours is not None and ours.speedup is not None and ours.speedup.high < 1

    @property
    def failures(self) -> list[Measurement]:
        """The variants whose output is wrong."""
        return [m for m in self.measurements if m.wrong]


@dataclass(frozen=True)
class Session:
    """The date and the command line of measurements that were added to a file."""

    date: str
    command: str


@dataclass(frozen=True)
class Bench:
    """The content of a file of results: the machine, its peaks by "device dtype", and the results case by case."""

    machine: Machine
    config: BenchConfig
    rooflines: dict[str, Roofline] = field(default_factory=dict)
    sessions: tuple[Session, ...] = ()
    results: tuple[BenchResult, ...] = ()

    def differences(self, before: Bench) -> list[str]:
        """Return the differences that make the times of two files incomparable, a phrase each."""
        old, new = (dataclasses.asdict(bench.machine) | dataclasses.asdict(bench.config) for bench in (before, self))
        return differences(old, new)


@dataclass(frozen=True)
class Change:
    """The speed-ups over nn.Linear of a variant of a case in two benchmarks; the machine's state cancels."""

    case: Case
    name: str
    before: Spread
    now: Spread

    @property
    def ratio(self) -> float:
        """The new speed-up over the old: above 1 if faster than before."""
        return self.now.median / self.before.median

    @property
    def beyond_spread(self) -> bool:
        return self.before.apart(self.now)


def compare(before: Bench, now: Iterable[BenchResult]) -> list[Change]:
    """Return the changes of all variants that both benchmarks measured, in the order of the second."""
    old = {(r.case, m.name): m.speedup for r in before.results for m in r.measurements}
    return [
        Change(result.case, m.name, past, m.speedup)
        for result in now
        for m in result.measurements
        if m.speedup and (past := old.get((result.case, m.name)))
    ]


def write(bench: Bench, path: Path) -> None:
    """Write a file atomically: a line per case, without None and defaults."""
    head = {"format": FORMAT} | {f.name: _plain(getattr(bench, f.name)) for f in dataclasses.fields(bench)[:-1]}
    lines = ",\n".join(json.dumps(_plain(result), ensure_ascii=False) for result in bench.results)
    head_text = json.dumps(head, indent=2, ensure_ascii=False).removesuffix("\n}")
    write_text(path, f'{head_text},\n  "results": [\n{lines}\n]}}\n')


def read(path: Path) -> Bench:
    """Read a file. Raises ValueError if it is missing, damaged or of another format."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, this program's is {FORMAT}")
        return Bench(
            Machine(**_tuples(content["machine"])),
            BenchConfig(**_tuples(content["config"])),
            {name: Roofline(**roofline) for name, roofline in content["rooflines"].items()},
            tuple(Session(**session) for session in content["sessions"]),
            tuple(map(_result, content["results"])),
        )
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no measurements that can be read: {error!r}") from None


def _plain(value: Any) -> Any:
    """Return a JSON value; a spread as [median, low, high], numbers to six digits."""
    if isinstance(value, Spread):
        return [_plain(number) for number in vars(value).values()]
    if dataclasses.is_dataclass(value):
        named = ((f.name, getattr(value, f.name), f.default) for f in dataclasses.fields(value))
        return {name: _plain(item) for name, item, default in named if item != default}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _tuples(content: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}


def _result(content: dict[str, Any]) -> BenchResult:
    measurements = []
    for measurement in content["measurements"]:
        spreads = {name: Spread(*value) for name, value in measurement.items() if isinstance(value, list)}
        measurements.append(Measurement(**measurement | spreads))
    case, traffic = Case(**content["case"]), Traffic(**content["traffic"])
    return BenchResult(**content | {"case": case, "traffic": traffic, "measurements": tuple(measurements)})
