"""Results of `gpu_day` as a page of tables, with a verdict on the default backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import geometric_mean

from einlinear_lab.bench.gpu import BACKENDS, BATCHED, TRITON, Row
from einlinear_lab.bench.tables import Table, number
from einlinear_lab.bench.variants import COMPILED, COPYING, DENSE, FUSED

KERNELS, SUITE, TUNED, BLOCKS, MIXTURES, GPTS = "kernels", "suite", "tuned", "blocks", "mixtures", "gpt"


# part -> its share of the time; what a part leaves over goes to the next ones
SHARES = {KERNELS: 0.22, SUITE: 0.3, TUNED: 0.18, BLOCKS: 0.12, MIXTURES: 0.07, GPTS: 0.11}


TITLES = {
    KERNELS: "Kernels against float64",
    SUITE: "Layers, EINLINEAR_TUNE=0: the first tile",
    TUNED: "Layers, tiles tuned",
    BLOCKS: "Feed-forward blocks, EINLINEAR_TUNE=0, layer by layer and fused by the Triton kernels",
    MIXTURES: f"Mixtures, 8 experts, 2 active, EINLINEAR_TUNE=0, against {DENSE} of the same size",
    GPTS: "GPT, a training step of 16,384 tokens, EINLINEAR_TUNE=0",
}


# a default that is slower than the other backend by more than this is wrong
TOLERANCE = 1.3


def page(record: Row) -> str:
    """Return all results in Markdown."""
    machine, parts = record["machine"], record["parts"]
    head = (
        f"- GPU: {machine['gpu'] or 'none'}, driver {record['driver']}\n"
        f"- CPU: {machine['cpu']}, {machine['cores']} cores\n"
        f"- Python {machine['python']}, torch {machine['torch']}, triton {record['triton']}, "
        f"einlinear {machine['einlinear']} ({machine['code']})\n- {record['date']}"
    )
    states = [(part, state["status"], str(len(state["results"]))) for part, state in parts.items()]
    failures = [
        (part, name, text.replace("\n", " ").replace("|", "/"))
        for part, state in parts.items()
        for name, text in failed(state)
    ]
    tables = [Table("Parts", ("part", "status", "results"), tuple(states))]
    tables += [Table("Failures", ("part", "case", "failure"), tuple(failures))] * bool(failures)
    tables += [table(part, parts[part]["results"]) for part in SHARES if part in parts and part != KERNELS]
    title = "# Benchmark of a GPU" + ": rehearsal on a CPU, whose times mean nothing" * record["rehearsal"]
    sections = [title, head, f"    {record['command']}", f"## Verdict\n\n{conclude(record)}"]
    return "\n\n".join([*sections, *(table.markdown() for table in tables)]) + "\n"


def failed(state: Row) -> list[tuple[str, str]]:
    """Return (case, failure) for cases that raised, failing tests and wrong outputs of a part."""
    wrong = [(name, text) for name, row in state["results"].items() for text in row["failed"]]
    return [*state["failures"].items(), *wrong]


def table(part: str, rows: Mapping[str, Row]) -> Table:
    """Return the times of the dense layer or model, and the speed-ups over it."""
    backends = (*BACKENDS, *[FUSED] * (part in (BLOCKS, GPTS)))
    variants = [*backends, *[COMPILED, COPYING] * (part in (SUITE, TUNED))]
    ratio = f"{backends[-1]} / {BATCHED}"
    headings = ("case", f"{DENSE} ms", *(f"{name} ×" for name in variants), "limit", ratio, "peak MB")
    lines = []
    for name, row in rows.items():
        ms = {variant: times[0] for variant, times in row["ms"].items()}
        speedups = (ms[DENSE] / ms[variant] if variant in ms else None for variant in variants)
        gain = ms[BATCHED] / ms[backends[-1]] if {BATCHED, backends[-1]} <= ms.keys() else None
        peaks = " / ".join(number(row["peak_mb"].get(variant)) for variant in (DENSE, *backends))
        lines.append((name, number(ms[DENSE]), *map(number, speedups), number(row.get("limit")), number(gain), peaks))
    return Table(f"{TITLES[part]} (peak MB: {' / '.join((DENSE, *backends))})", headings, tuple(lines))


def conclude(record: Row) -> str:
    """Return which backend CUDA should take by default, and where it would be slower by more than 1.3x."""
    parts = record["parts"]
    failures = [(key, *failure) for key, part in parts.items() for failure in failed(part)]
    wrong = [
        name
        for key, name, text in failures
        if key == KERNELS or TRITON in text or text.startswith(FUSED) or "CUDA error" in text
    ]
    lines = ["Rehearsal on a CPU: the times mean nothing."] * record["rehearsal"]
    if wrong:
        lines.append(f"**{BATCHED}**, whatever the times: triton failed in {len(wrong)} cases, such as {wrong[0]}.")
    elif not any(row.get("passed", 1) for row in parts.get(KERNELS, {}).get("results", {}).values()):
        lines.append("The kernels were not checked, so the times below decide nothing yet.")
    for part, rivals in ((TUNED, BACKENDS), (SUITE, BACKENDS), (BLOCKS, (BATCHED, FUSED))):
        verdict = judge_backends(parts.get(part, {}).get("results", {}), *rivals)
        if verdict is None:
            lines.append(f"{TITLES[part]}: no verdict, because no case was measured with both {' and '.join(rivals)}.")
            continue
        other = next(name for name in rivals if name != verdict.default)
        losses = "".join(f"\n- {number(loss)}x: {case}" for case, loss in verdict.wrong.items())
        lines.append(
            f"{TITLES[part]}: **{verdict.default}** by default, {number(verdict.gain)}x as fast as {other} by the "
            f"geometric mean over {verdict.cases} cases. "
            f"{other} is faster by more than {TOLERANCE}x in {len(verdict.wrong)} cases{':' if losses else '.'}{losses}"
        )
    return "\n\n".join(lines)


@dataclass(frozen=True)
class BackendVerdict:
    """The faster of two backends by the geometric mean over cases, and the cases where the other is 1.3x faster.

    Attributes:
        default: its name; "fused" for blocks that are fused by the Triton kernels.
        gain: how many times as fast as the other backend the default is, by the geometric mean.
        wrong: case -> how many times as fast as the default the other backend is.
    """

    default: str
    cases: int
    gain: float
    wrong: Mapping[str, float]


def judge_backends(rows: Mapping[str, Row], first: str = BATCHED, second: str = TRITON) -> BackendVerdict | None:
    """Return the verdict on measured layers or blocks, or None if no case was measured by both backends.

    >>> times = {"a": {"batched": [6.0], "triton": [1.0]}, "b": {"batched": [2.0], "triton": [3.0]}}
    >>> judge_backends({case: {"ms": ms} for case, ms in times.items()})
    BackendVerdict(default='triton', cases=2, gain=2.0, wrong={'b': 1.5})
    """
    times = {case: row["ms"] for case, row in rows.items() if {first, second} <= row["ms"].keys()}
    gains = {case: ms[first][0] / ms[second][0] for case, ms in times.items()}
    if not gains:
        return None
    mean = geometric_mean(gains.values())
    default = second if mean > 1 else first
    losses = {case: 1 / gain if default == second else gain for case, gain in gains.items()}
    wrong = {case: loss for case, loss in losses.items() if loss > TOLERANCE}
    return BackendVerdict(default, len(gains), max(mean, 1 / mean), wrong)
