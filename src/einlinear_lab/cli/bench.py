"""`einlinear bench`: its options, and what it prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from einlinear_lab.cli import display
from einlinear_lab.cli.endings import interruptible, user_errors
from einlinear_lab.cli.parsing import numbers, specs
from einlinear_lab.cli.running import command_line

if TYPE_CHECKING:  # heavy: imported by the command itself
    from einlinear_lab.bench.mixtures import Case
    from einlinear_lab.bench.run import Recorder
    from einlinear_lab.bench.tables import Table

MIXTURES, PROJECTIONS = "moe", "projection"  # suites that measure something else than layers


def command(
    suite: Annotated[
        str | None,
        typer.Option(
            help="What to measure: quick (the default), small, standard (20 minutes on two cores), gpu, moe (mixtures "
            "of experts), projection (of a large weight). The other options override it."
        ),
    ] = None,
    structures: Annotated[
        list[str] | None,
        typer.Option(
            help="Structures, separated by ';' (names of families also by ','); may be repeated. {d/8} stands for an "
            "eighth of the features."
        ),
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Features of the layers, or in x out, such as 1024,1024x4096.")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Input vectors at a time, such as 1,2048. Up to 16 are a decode pass, more a forward and a train pass."
        ),
    ] = None,
    passes: Annotated[
        str | None, typer.Option(help="Which of forward, train, decode to measure. Default: all.")
    ] = None,
    dtypes: Annotated[str | None, typer.Option("--dtype", help="Which of float32, bfloat16, float16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    bias: Annotated[bool | None, typer.Option(help="Whether the layers have a bias. Default: no.")] = None,
    backends: Annotated[
        str | None, typer.Option(help="Backends to measure one by one, or none. Default: all that can run.")
    ] = None,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Whether to measure torch.compile of the einsum too.")
    ] = None,
    budget: Annotated[float | None, typer.Option(min=0, help="Seconds that each case is repeated for.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: as many as torch takes.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Results folder; what it lacks is measured. Default: results/bench-SUITE.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what the results folder holds.")] = False,
    compared: Annotated[
        Path | None,
        typer.Option(
            "--compare", help="An earlier bench.json, or its folder: measure the same cases and show what changed."
        ),
    ] = None,
    variants: Annotated[
        bool, typer.Option("--variants", help="Print a row for every variant, not only for el.Linear.")
    ] = False,
) -> None:
    """Measure speed and memory of structures and backends beside nn.Linear, in turns.

    Outputs and gradients are first checked against the dense matrix in float64: where they are wrong no speed-up is
    given, and the exit status is 1. The same command again measures only what is missing.
    """
    import torch

    from einlinear_lab.bench import changes, claims, mixtures, plot, projections, tables
    from einlinear_lab.bench.cases import choose
    from einlinear_lab.bench.results import read
    from einlinear_lab.bench.run import FILE, Recorder

    with user_errors():
        grid: dict[str, Any] = {
            "structures": specs(structures),
            "sizes": _sizes(sizes),
            "tokens": numbers(tokens, "--tokens"),
            "modes": _words(passes),
            "dtypes": _words(dtypes),
            "device": device,
            "bias": bias,
        }
        if threads is not None:
            torch.set_num_threads(threads)
        if suite == MIXTURES:
            _refuse(suite, structures=structures, bias=bias, variants=variants, compile=compiled, compare=compared)
            own = {name: grid[name] for name in ("sizes", "tokens", "modes", "dtypes", "device")}
            _mixtures(mixtures.cases(**own, backends=_words(backends)), budget, out)
            return
        if suite == PROJECTIONS:
            _refuse(suite, tokens=tokens, passes=passes, dtype=dtypes, bias=bias, backends=backends, budget=budget)
            _refuse(suite, variants=variants, compile=compiled, compare=compared)
            _projections(grid["structures"] or projections.SPECS, grid["sizes"] or (projections.SIZE,), device, out)
            return
        past = None if compared is None else read(compared / FILE if compared.is_dir() else compared)
        chosen = choose(suite or "quick", **grid, backends=_words(backends), compiled=compiled, budget=budget)
        if past and suite is None and all(value is None for value in grid.values()):
            cases, settings = [result.case for result in past.results], past.settings
        else:
            cases, settings = chosen.cases(), chosen.settings
        folder = out or Path("results") / f"bench-{suite or ('compare' if past else 'quick')}"
        recorder = Recorder(folder, cases, settings, command_line(), fresh, reading=past is not None)

    with interruptible(f"Interrupted. {recorder.path} keeps every finished case; the same command goes on from there."):
        _measure(recorder)
    found = recorder.results
    (folder / "bench.md").write_text(tables.page(recorder.bench), encoding="utf-8")
    if find_spec("matplotlib"):
        plot.draw(recorder.bench.results, folder / "bench.png")
    else:
        display.warning("bench.png is drawn with matplotlib: pip install 'einlinear[lab]'")

    _print(tables.details(found) if variants else tables.summary(found))
    verdicts = [verdict for verdict in claims.judge(found) if verdict.values]
    _print([tables.refusals(found), tables.conclusions(verdicts), tables.misses(verdicts), tables.dense_wins(found)])
    if past:
        for difference in recorder.bench.differences(past):
            display.note(f"Not as in {compared}: {difference}")
        _print([tables.changed(changes.changes(past, found))])
    display.note(f"Results: {recorder.path}, bench.md and bench.png beside it. docs/benchmarks says what they mean.")
    wrong = [f"{result.case}, {m.name}: {m.refusal}" for result in found for m in result.failures]
    for message in wrong:
        display.error(message)
    if wrong:
        raise typer.Exit(1)


def _mixtures(cases: Sequence[Case], budget: float | None, out: Path | None) -> None:
    """Measure mixtures of experts, all anew."""
    from einlinear_lab.bench import mixtures
    from einlinear_lab.bench.machine import this_machine

    folder, machine = out or Path("results") / f"bench-{MIXTURES}", this_machine(cases[0].device)
    display.note(str(machine))
    results, failures = [], []
    with display.progress() as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=str(case))
            try:
                results.append(mixtures.measure(case, 10.0 if budget is None else budget))
            except RuntimeError as error:  # a wrong result, or an backend that cannot run: the others go on
                failures.append(f"{case}: {error}")
            progress.advance(task)
    if results:  # earlier ones stay until there are new ones
        folder.mkdir(parents=True, exist_ok=True)
        mixtures.write(machine, command_line(), results, folder)
        _print([mixtures.times(results), mixtures.conclusions(results)])
        display.note(f"Results: {folder / mixtures.FILE}, moe.md beside it.")
    for message in failures:
        display.error(message)
    if failures:
        raise typer.Exit(1)


def _refuse(suite: str, **given: object) -> None:
    """Raise ValueError for options that were given, but mean nothing for a suite."""
    for name, value in given.items():
        if value not in (None, False):
            raise ValueError(f"--{name} has no meaning for --suite {suite}")


def _projections(chosen: Sequence[str], sizes: Sequence[tuple[int, int]], device: str | None, out: Path | None) -> None:
    """Measure projections, all anew."""
    from einlinear_lab.bench import projections
    from einlinear_lab.bench.cases import DEVICES, check
    from einlinear_lab.bench.machine import this_machine

    check("device", [device or DEVICES[0]], DEVICES)
    folder, machine = out or Path("results") / f"bench-{PROJECTIONS}", this_machine(device or DEVICES[0])
    display.note(str(machine))
    results = []
    with display.progress() as progress:
        task = progress.add_task("", total=len(chosen) * len(sizes))
        for spec, size in product(chosen, sizes):
            progress.update(task, description=spec)
            results.append(projections.measure(spec, size, device or DEVICES[0]))
            progress.advance(task)
    folder.mkdir(parents=True, exist_ok=True)
    projections.write(machine, command_line(), results, folder)
    _print([projections.table(results)])
    display.note(f"Results: {folder / projections.FILE}, projection.md beside it.")


def _measure(recorder: Recorder) -> None:
    """Measure what is missing, with a progress bar."""
    missing = recorder.missing
    display.note(str(recorder.bench.machine))
    if not missing:
        display.note(f"{recorder.path} has all cases already; --fresh measures them again.")
        return
    display.note(
        f"{len(missing)} of {len(recorder.cases)} cases to measure, about {_duration(recorder.estimate())}; "
        f"results in {recorder.path}."
    )
    with display.progress() as progress:
        task = progress.add_task("", total=len(missing))
        for case in missing:
            progress.update(task, description=str(case))
            recorder.measure(case)
            progress.advance(task)


def _print(found: Iterable[Table]) -> None:
    """Those that have rows."""
    for table in found:
        if table.rows:
            display.show(table.headings, table.rows, table.title, prose=True)
            display.note("")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"


def _words(text: str | None) -> tuple[str, ...] | None:
    """ "forward, train" -> ("forward", "train"), "none" -> ()."""
    if text is None:
        return None
    return tuple(word for word in map(str.strip, text.split(",")) if word not in ("", "none"))


def _sizes(text: str | None) -> tuple[tuple[int, int], ...] | None:
    """ "1k,1024x4096" -> ((1000, 1000), (1024, 4096))."""
    if text is None:
        return None
    found = []
    for word in filter(None, map(str.strip, text.split(","))):
        pair = numbers(word.replace("x", ","), "--sizes") or ()
        if len(pair) not in (1, 2):
            raise ValueError(f"--sizes: {word!r} is no size; write 1024, or 1024x4096 for in x out")
        found.append((pair[0], pair[-1]))
    return tuple(found)
