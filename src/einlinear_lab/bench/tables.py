"""Results as tables of text: for the terminal, and as pages of Markdown."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from einlinear import ops
from einlinear.files import write_text
from einlinear_lab.bench.cases import MODES, Case
from einlinear_lab.bench.claims import Verdict, judge
from einlinear_lab.bench.machine import Machine
from einlinear_lab.bench.results import Bench, BenchResult, Change, Measurement
from einlinear_lab.bench.timing import Spread
from einlinear_lab.bench.variants import BLOCK, DENSE, FUSED, OURS, TWO


@dataclass(frozen=True)
class Table:
    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """Return the table with its title in Markdown."""
        lines = [self.headings, ("---",) * len(self.headings), *self.rows]
        return f"## {self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(results: Iterable[BenchResult]) -> list[Table]:
    """Return a table per pass, dtype and device with a row per case: el.Linear as dispatched against nn.Linear.

    In tables of blocks it is el.FeedForward against nn.Linear, and against el.Linear one after the other.
    """
    first = ("structure", "in → out", "tokens", "MACs", f"{DENSE} ms", f"{OURS} ms")
    tables = []
    for title, group in _by_kind(results):
        is_block = group[0].case.is_block
        names = (*first, f"{BLOCK} ms") if is_block else first
        rows = tuple(map(_summary_row, group))
        tables.append(Table(title, (*names, "backend", *_ratio_names(group[0].case), "remarks"), rows))
    return tables


def details(results: Iterable[BenchResult]) -> list[Table]:
    """Return a table per pass, dtype and device with a row per variant."""
    first = ("structure", "in → out", "tokens", "variant", "ms", "quartiles", "runs")
    tables = []
    for title, group in _by_kind(results):
        rows = (_detail_row(r, m) for r in group for m in r.measurements if m.seconds or m.wrong)
        tables.append(Table(title, (*first, *_ratio_names(group[0].case), "remarks"), tuple(rows)))
    return tables


def refusals(results: Iterable[BenchResult]) -> Table:
    """Return the variants that were not measured, and the reasons."""
    reasons = Counter((m.name, str(m.refusal)) for r in results for m in r.measurements if not (m.seconds or m.wrong))
    rows = [(name, f"{count}", reason) for (name, reason), count in reasons.items()]
    return Table("Not measured", ("variant", "cases", "reason"), tuple(rows))


def conclusions(verdicts: Iterable[Verdict]) -> Table:
    rows = []
    for verdict in verdicts:
        worst, value = verdict.values[0] if verdict.values else (None, None)
        missed = f"{len(verdict.missed)} of {len(verdict.values)}"
        case, least = str(worst.case) if worst else "–", number(verdict.claim.least)
        rows.append((verdict.summary, verdict.claim.text, number(value), least, case, missed))
    return Table("Conclusions", ("verdict", "claim", "worst", "promised", "case", "missed"), tuple(rows))


def misses(verdicts: Iterable[Verdict]) -> Table:
    rows = [
        (verdict.claim.text, str(result.case), number(value), number(verdict.claim.least))
        for verdict in verdicts
        for result, value in verdict.missed
    ]
    return Table("Missed", ("claim", "case", "measured", "promised"), tuple(rows))


def dense_wins(results: Iterable[BenchResult]) -> Table:
    """Return the cases where nn.Linear is faster, beyond the spread."""
    rows = [
        (str(result.case), f"{1 / result.limit:.1%}", number(ours.speedup))
        for result in results
        if result.dense_wins and (ours := result.of(result.ours))
    ]
    return Table("Dense wins here", ("case", "MACs of dense", f"× {DENSE}"), tuple(rows))


def changed(changes: Iterable[Change]) -> Table:
    """Return all changes, those beyond the spread marked."""
    rows = []
    for change in changes:
        case, direction = change.case, "faster" if change.ratio > 1 else "slower"
        verdict = direction if change.beyond_spread else "within the spread"
        times = number(change.before), number(change.now), f"{change.ratio - 1:+.0%}", verdict
        rows.append((case.structure, _size(case), str(case.tokens), case.mode, change.name, *times))
    headings = ("structure", "in → out", "tokens", "pass", "variant", "× before", "× now", "change", "")
    return Table(f"Changes of the speed-up over {DENSE}", headings, tuple(rows))


def write_results(
    path: Path, title: str, machine: Machine, command: str, results: Sequence[Any], tables: Sequence[Table]
) -> None:
    """Write results as JSON, and their tables as Markdown beside it."""
    head = {"machine": dataclasses.asdict(machine), "command": command}
    content = head | {"results": [dataclasses.asdict(result) for result in results]}
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    parts = [f"# {title}", str(machine), f"    {command}", *(table.markdown() for table in tables if table.rows)]
    write_text(path.with_suffix(".md"), "\n\n".join(parts) + "\n")


def page(bench: Bench) -> str:
    """Return all results in Markdown, without the single variants."""
    verdicts = judge(bench.results)
    judgements = conclusions(verdicts), misses(verdicts), dense_wins(bench.results)
    rooflines = (
        f"- {name}: {peak.flops / 1e9:,.0f} GFLOP/s in a large matmul, {peak.bandwidth / 1e9:,.0f} GB/s in a large copy"
        for name, peak in bench.rooflines.items()
    )
    parts = [
        "# einlinear bench",
        str(bench.machine),
        "\n".join(rooflines),
        "\n".join(f"    {session.command}    # {session.date}" for session in bench.sessions),
        *(table.markdown() for table in judgements if table.rows),
        "![Speed-up over nn.Linear against the reduction of MACs](bench.png)",
        *(table.markdown() for table in summary(bench.results)),
    ]
    return "\n\n".join(parts) + "\n"


def _ratio_names(case: Case) -> tuple[str, ...]:
    """Return the headings of `_ratios`."""
    other = f"× {OURS}" if case.is_block else "× copying"
    last = ("roofline", f"peak {other}" if case.is_block else "GB/s", "peak MB")
    last = ("weight GB/s", "read GB/s", "of read") if case.cold else last
    return (f"× {DENSE}", "limit", "fraction", other, *last)


def _summary_row(result: BenchResult) -> tuple[str, ...]:
    case, dense, layers = result.case, result.of(DENSE), result.of(OURS)
    ours = next(m for m in result.measurements if m.name == result.ours)
    *ratios, last = _ratios(result, ours)
    for other in (dense, layers if case.is_block else None):
        if other and other.peak_bytes:
            last = f"{last} / {number(other.peak_bytes / 1e6)}"
    shown = (dense, layers, ours) if case.is_block else (dense, ours)
    times = (_milliseconds(m.seconds) if m else "–" for m in shown)
    remarks = ["dense wins"] * result.dense_wins + [f"{m.name} is wrong: {m.refusal}" for m in result.failures]
    others, low = {*ops.BACKENDS, TWO, FUSED} - {result.backend}, ours.seconds.low if ours.seconds else 0.0
    others |= {OURS} if case.is_block else set()
    rivals = [m for m in result.measurements if m.name in others and m.seconds and m.seconds.high < low]
    remarks += [f"{rival.name} is faster" for rival in rivals]
    spec = (case.structure, _size(case), str(case.tokens), f"{result.macs:,}")
    return (*spec, *times, result.backend, *ratios, last, "; ".join(remarks))


def _detail_row(result: BenchResult, m: Measurement) -> tuple[str, ...]:
    case, t = result.case, m.seconds
    quartiles = f"{number(1000 * t.low)} to {number(1000 * t.high)}" if t else "–"
    times = (number(1000 * t.median if t else None), quartiles, str(m.runs or "–"))
    remark = f"wrong: {m.refusal}" if m.wrong else ""
    return (case.structure, _size(case), str(case.tokens), m.name, *times, *_ratios(result, m), remark)


def _ratios(result: BenchResult, m: Measurement) -> tuple[str, ...]:
    """Return the cells below `_ratio_names`."""
    bandwidth = result.bandwidth(m.name)
    last = [result.roofline_fraction(m.name), bandwidth and bandwidth / 1e9, m.peak_bytes and m.peak_bytes / 1e6]
    # MACs and bytes are those of the structure
    if m.name == DENSE:
        last[:2] = None, None
    if result.case.is_block:
        last[1] = result.memory_over_layers(m.name)
    if result.read_bandwidth and (weights := result.weight_bandwidth(m.name)):
        last = [weights / 1e9, result.read_bandwidth / 1e9, result.read_fraction(m.name)]
    limit, fraction = (result.limit, result.fraction(m.name)) if m.seconds and m.name != DENSE else (None, None)
    over = m.over_layers if result.case.is_block else m.over_copying
    return tuple(map(number, (m.speedup, limit, fraction, over, *last)))


def _by_kind(results: Iterable[BenchResult]) -> Iterator[tuple[str, list[BenchResult]]]:
    """Group the results by pass, dtype and device, blocks after layers, with a title."""

    def kind(result: BenchResult) -> tuple[bool, int, str]:
        case = result.case
        blocks = "blocks, " if case.is_block else ""
        bias = ", with bias" if case.bias else ""
        cold = " from cold weights" if case.cold else ""
        title = f"{blocks}{case.mode}{cold}, {case.dtype} on {case.device}{bias}"
        return case.is_block, MODES.index(case.mode), title

    for (*_, title), group in groupby(sorted(results, key=kind), kind):
        yield title, list(group)


def _size(case: Case) -> str:
    """Return the size of a layer, or the sizes and the activation of a block."""
    return f"{case.size}, {case.kind}" if case.is_block else case.size


def _milliseconds(seconds: Spread | None) -> str:
    """Return milliseconds with half the interquartile range, such as "1.23 ±4%"."""
    if seconds is None:
        return "–"
    return f"{number(1000 * seconds.median)} ±{(seconds.high - seconds.low) / 2 / seconds.median:.0%}"


def number(value: float | Spread | None) -> str:
    """Return a number, or the median of a spread, with three digits, without exponent."""
    if value is None:
        return "–"
    value = value.median if isinstance(value, Spread) else value
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.4f}"
