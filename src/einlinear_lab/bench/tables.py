"""The measurements as tables of text: for the terminal, and as a page of Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from einlinear import ops
from einlinear_lab.bench.cases import MODES
from einlinear_lab.bench.changes import Change
from einlinear_lab.bench.claims import Verdict, judge
from einlinear_lab.bench.results import Bench, Measurement, Result
from einlinear_lab.bench.timing import Spread
from einlinear_lab.bench.variants import DENSE, OURS


@dataclass(frozen=True)
class Table:
    """A title, headings, and rows of as many cells."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        lines = [self.headings, ("---",) * len(self.headings), *self.rows]
        return f"## {self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(results: Iterable[Result]) -> list[Table]:
    """A table per pass, dtype and device with a row per case: our layer as dispatched, beside nn.Linear."""
    headings = ("structure", "in → out", "tokens", "MACs", f"{DENSE} ms", f"{OURS} ms", "backend", *_RATIOS, "remarks")
    return [Table(title, headings, tuple(map(_summary_row, own))) for title, own in _by_kind(results)]


def details(results: Iterable[Result]) -> list[Table]:
    """The same with a row per variant."""
    headings = ("structure", "in → out", "tokens", "variant", "ms", "quartiles", "runs", *_RATIOS, "remarks")
    return [
        Table(title, headings, tuple(_detail_row(r, m) for r in own for m in r.measurements if m.seconds or m.wrong))
        for title, own in _by_kind(results)
    ]


def refusals(results: Iterable[Result]) -> Table:
    """What was not measured, and why."""
    why = Counter((m.name, str(m.refusal)) for r in results for m in r.measurements if not (m.seconds or m.wrong))
    rows = [(name, f"{count}", reason) for (name, reason), count in why.items()]
    return Table("Not measured", ("variant", "cases", "why"), tuple(rows))


def conclusions(verdicts: Iterable[Verdict]) -> Table:
    """A row per claim: what the run says about it, and the worst result."""
    rows = []
    for verdict in verdicts:
        worst, value = verdict.values[0] if verdict.values else (None, None)
        missed = f"{len(verdict.missed)} of {len(verdict.values)}"
        rows.append((verdict.summary, verdict.claim.text, number(value), str(worst.case) if worst else "–", missed))
    return Table("Conclusions", ("verdict", "claim", "worst", "where", "missed"), tuple(rows))


def misses(verdicts: Iterable[Verdict]) -> Table:
    """Every result that refutes a claim."""
    rows = [
        (verdict.claim.text, str(result.case), number(value), number(verdict.claim.least))
        for verdict in verdicts
        for result, value in verdict.missed
    ]
    return Table("Missed", ("claim", "where", "measured", "promised"), tuple(rows))


def dense_wins(results: Iterable[Result]) -> Table:
    """Where nn.Linear is the faster choice, beyond the spread."""
    rows = [
        (str(result.case), f"{1 / result.limit:.1%}", number(ours.speedup.median))
        for result in results
        if result.dense_wins and (ours := result.of(OURS)) and ours.speedup
    ]
    return Table("Dense wins here", ("case", "MACs of dense", f"× {DENSE}"), tuple(rows))


def changed(changes: Iterable[Change]) -> Table:
    """Every change, those beyond the spread marked."""
    rows = [
        (
            change.case.structure,
            change.case.size,
            str(change.case.tokens),
            change.case.mode,
            change.name,
            number(change.before.median),
            number(change.now.median),
            f"{change.ratio - 1:+.0%}",
            ("faster" if change.ratio > 1 else "slower") if change.beyond_spread else "within the spread",
        )
        for change in changes
    ]
    headings = ("structure", "in → out", "tokens", "pass", "variant", "× before", "× now", "change", "")
    return Table(f"Changes of the speed-up over {DENSE}", headings, tuple(rows))


def page(bench: Bench) -> str:
    """All of it in Markdown, but for the variants one by one."""
    verdicts = judge(bench.results)
    roofs = (
        f"- {name}: {roof.flops / 1e9:,.0f} GFLOP/s in a large matmul, {roof.bandwidth / 1e9:,.0f} GB/s in a large copy"
        for name, roof in bench.roofs.items()
    )
    parts = [
        "# einlinear bench",
        str(bench.machine),
        "\n".join(roofs),
        "\n".join(f"    {session.command}    # {session.date}" for session in bench.sessions),
        *(
            table.markdown()
            for table in (conclusions(verdicts), misses(verdicts), dense_wins(bench.results))
            if table.rows
        ),
        "![Speed-up over nn.Linear against the reduction of MACs](bench.png)",
        *(table.markdown() for table in summary(bench.results)),
    ]
    return "\n\n".join(parts) + "\n"


_RATIOS = (f"× {DENSE}", "limit", "fraction", "× copying", "roofline", "GB/s", "peak MB")


def _summary_row(result: Result) -> tuple[str, ...]:
    case, dense = result.case, result.of(DENSE)
    ours = next(m for m in result.measurements if m.name == OURS)
    *ratios, peak = _ratios(result, ours)
    if dense and dense.peak_bytes:
        peak = f"{peak} / {number(dense.peak_bytes / 1e6)}"
    times = (_milliseconds(m.seconds) if m else "–" for m in (dense, ours))
    remarks = ["dense wins"] * result.dense_wins + [f"{m.name} is wrong: {m.refusal}" for m in result.failures]
    remarks += [f"{name} is faster" for name in _faster(result, ours)]
    spec = (case.structure, case.size, str(case.tokens), f"{result.macs:,}")
    return (*spec, *times, result.backend, *ratios, peak, "; ".join(remarks))


def _faster(result: Result, ours: Measurement) -> list[str]:
    """The other backends that would have been the better choice, beyond the spread."""
    others = {*ops.BACKENDS} - {result.backend}
    rivals = [m for m in result.measurements if m.name in others and m.seconds]
    return [m.name for m in rivals if ours.seconds and m.seconds and m.seconds.high < ours.seconds.low]


def _detail_row(result: Result, m: Measurement) -> tuple[str, ...]:
    case, t = result.case, m.seconds
    quartiles = f"{number(1000 * t.low)} to {number(1000 * t.high)}" if t else "–"
    times = (number(1000 * t.median if t else None), quartiles, str(m.runs or "–"))
    remark = f"wrong: {m.refusal}" if m.wrong else ""
    return (case.structure, case.size, str(case.tokens), m.name, *times, *_ratios(result, m), remark)


def _ratios(result: Result, m: Measurement) -> tuple[str, ...]:
    """The cells of `_RATIOS`."""
    bandwidth = result.bandwidth(m.name)
    values = (
        _median(m.speedup),
        result.limit if m.seconds else None,
        result.fraction(m.name),
        _median(m.over_copying),
        result.of_roof(m.name),
        bandwidth and bandwidth / 1e9,
    )
    about_dense = m.name == DENSE  # it has other MACs and moves other bytes than the structure
    cells = ["–"] * len(values) if about_dense else [number(value) for value in values]
    return (*cells, number(m.peak_bytes and m.peak_bytes / 1e6))


def _by_kind(results: Iterable[Result]) -> Iterator[tuple[str, list[Result]]]:
    """The results of a pass, dtype and device together, with a title."""

    def kind(result: Result) -> tuple[int, str]:
        case = result.case
        bias = ", with bias" if case.bias else ""
        return MODES.index(case.mode), f"{case.mode}, {case.dtype} on {case.device}{bias}"

    for (_, title), own in groupby(sorted(results, key=kind), kind):
        yield title, list(own)


def _median(spread: Spread | None) -> float | None:
    return spread.median if spread else None


def _milliseconds(seconds: Spread | None) -> str:
    """Such as "1.23 ±4%", half of what lies between the quartiles."""
    if seconds is None:
        return "–"
    return f"{number(1000 * seconds.median)} ±{(seconds.high - seconds.low) / 2 / seconds.median:.0%}"


def number(value: float | None) -> str:
    """Three digits, without exponents."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.4f}"
