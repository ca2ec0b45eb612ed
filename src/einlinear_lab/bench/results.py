"""What was measured, and the file it is kept in."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from einlinear.files import differences, write_text
from einlinear_lab.bench.cases import Case, Settings
from einlinear_lab.bench.machine import Machine, Roof
from einlinear_lab.bench.timing import Spread
from einlinear_lab.bench.traffic import Traffic
from einlinear_lab.bench.variants import OURS

FORMAT = 1  # of the file; raised when an older program could misread it


@dataclass(frozen=True)
class Measurement:
    """One variant of one case. Ratios are those of calls in the same round.

    Attributes:
        name: of the variant.
        refusal: why it was not measured: it cannot run here, or (`wrong`) its results are not right.
        wrong: whether the refusal is because of a wrong result; then it counts as a failure of the whole run.
        seconds: of a call.
        runs: how many were timed.
        speedup: over nn.Linear.
        over_copying: speed-up over the copying baseline.
        peak_bytes: the most that a training step has allocated at once.
    """

    name: str
    refusal: str | None = None
    wrong: bool = False
    seconds: Spread | None = None
    runs: int = 0
    speedup: Spread | None = None
    over_copying: Spread | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Result:
    """One case.

    Attributes:
        case: what it is.
        macs: of the structure, for one token.
        backend: the dispatcher's choice.
        traffic: what has to be moved.
        roof_seconds: the least time that the machine's measured peaks allow.
        measurements: of the variants, nn.Linear first.
    """

    case: Case
    macs: int
    backend: str
    traffic: Traffic
    roof_seconds: float
    measurements: tuple[Measurement, ...]

    @property
    def limit(self) -> float:
        """How many times fewer MACs than dense."""
        return self.case.dense_macs / self.macs

    def of(self, name: str) -> Measurement | None:
        """The measurement of a variant that was timed."""
        return next((m for m in self.measurements if m.name == name and m.seconds), None)

    def fraction(self, name: str = OURS) -> float | None:
        """The speed-up over dense as a share of what the MACs alone would allow."""
        found = self.of(name)
        return found.speedup.median / self.limit if found and found.speedup else None

    def of_roof(self, name: str = OURS) -> float | None:
        """The share of the machine's measured peak, of arithmetic or of memory, whichever is the tighter."""
        found = self.of(name)
        return self.roof_seconds / found.seconds.median if found and found.seconds else None

    def bandwidth(self, name: str = OURS) -> float | None:
        """Bytes per second, if all of the estimated traffic went through memory."""
        found = self.of(name)
        return self.traffic.total / found.seconds.median if found and found.seconds else None

    @property
    def dense_wins(self) -> bool:
        """Whether nn.Linear is faster than our layer, beyond the spread."""
        ours = self.of(OURS)
        return ours is not None and ours.speedup is not None and ours.speedup.median < 1 and ours.speedup.high < 1

    @property
    def failures(self) -> list[Measurement]:
        """The variants whose results are wrong."""
        return [m for m in self.measurements if m.wrong]


@dataclass(frozen=True)
class Session:
    """When and how measurements were added to a file."""

    date: str
    command: str


@dataclass(frozen=True)
class Bench:
    """All that a file holds.

    Attributes:
        machine: what it was measured on.
        settings: how its cases were measured.
        roofs: by "device dtype".
        sessions: the command lines that added to it.
        results: case by case.
    """

    machine: Machine
    settings: Settings
    roofs: dict[str, Roof] = field(default_factory=dict)
    sessions: tuple[Session, ...] = ()
    results: tuple[Result, ...] = ()

    def differences(self, before: Bench) -> list[str]:
        """What makes the times of the two not comparable, one phrase each."""
        old, new = (dataclasses.asdict(bench.machine) | dataclasses.asdict(bench.settings) for bench in (before, self))
        return differences(old, new)


def write(bench: Bench, path: Path) -> None:
    """Write a file so that it is never seen half written: a line per case, without what is None."""
    head = {"format": FORMAT} | {f.name: _plain(getattr(bench, f.name)) for f in dataclasses.fields(bench)[:-1]}
    lines = ",\n".join(json.dumps(_plain(result), ensure_ascii=False) for result in bench.results)
    head_text = json.dumps(head, indent=2, ensure_ascii=False).removesuffix("\n}")
    write_text(path, f'{head_text},\n  "results": [\n{lines}\n]}}\n')


def read(path: Path) -> Bench:
    """What a file holds. Raises ValueError where it is absent, damaged or of another format."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, this program's is {FORMAT}")
        return Bench(
            Machine(**_tuples(content["machine"])),
            Settings(**_tuples(content["settings"])),
            {name: Roof(**roof) for name, roof in content["roofs"].items()},
            tuple(Session(**session) for session in content["sessions"]),
            tuple(_result(result) for result in content["results"]),
        )
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no measurements that can be read: {error!r}") from None


def _plain(value: Any) -> Any:
    """What JSON can hold; a spread as [median, low, high], numbers to six digits."""
    if isinstance(value, Spread):
        return [_plain(number) for number in (value.median, value.low, value.high)]
    if dataclasses.is_dataclass(value):
        named = ((f.name, getattr(value, f.name), f.default) for f in dataclasses.fields(value))
        return {name: _plain(own) for name, own, default in named if own != default}
    if isinstance(value, dict):
        return {name: _plain(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(own) for own in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _tuples(content: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}


def _result(content: dict[str, Any]) -> Result:
    parts = {
        "case": Case(**content["case"]),
        "traffic": Traffic(**content["traffic"]),
        "measurements": tuple(_measurement(m) for m in content["measurements"]),
    }
    return Result(**content | parts)


def _measurement(content: dict[str, Any]) -> Measurement:
    fields: dict[str, Any] = {k: Spread(*value) if isinstance(value, list) else value for k, value in content.items()}
    return Measurement(**fields)
