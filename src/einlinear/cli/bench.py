"""`einlinear bench`: its options, and what it prints."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table as RichTable
from rich.text import Text

from einlinear.cli import display
from einlinear.cli.endings import interruptible, user_errors
from einlinear.cli.parsing import numbers, specs

if TYPE_CHECKING:  # heavy: imported by the command itself
    from einlinear.bench.run import Recorder
    from einlinear.bench.tables import Table


def bench(
    suite: Annotated[
        str | None,
        typer.Option(
            help="quick (default), small, standard (20 minutes on two cores) or gpu; other options override it."
        ),
    ] = None,
    structures: Annotated[
        list[str] | None,
        typer.Option(help="Structures, separated by ';' (families also by ','). {d/8}: an eighth of the features."),
    ] = None,
    sizes: Annotated[str | None, typer.Option(help="Features, in x out, such as 1024,1024x4096.")] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Input vectors: up to 16 are a decode pass, more a forward and a train pass.")
    ] = None,
    passes: Annotated[str | None, typer.Option(help="Of forward, train, decode. Default: all.")] = None,
    dtypes: Annotated[str | None, typer.Option("--dtype", help="Of float32, bfloat16, float16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    bias: Annotated[bool | None, typer.Option(help="Whether the layers have a bias. Default: no.")] = None,
    executors: Annotated[
        str | None, typer.Option(help="Executors to measure one by one, or none. Default: all that can run.")
    ] = None,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Whether to measure torch.compile of the einsum too.")
    ] = None,
    budget: Annotated[float | None, typer.Option(min=0, help="Seconds to repeat each case for.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: those of torch.")] = None,
    out: Annotated[Path | None, typer.Option(help="Results folder, continued. Default: results/bench-SUITE.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what the results folder holds.")] = False,
    compared: Annotated[
        Path | None,
        typer.Option(
            "--compare", help="An earlier bench.json: measure its cases (unless --out has them), show changes."
        ),
    ] = None,
    variants: Annotated[bool, typer.Option("--variants", help="Print a row per variant, not only ours.")] = False,
) -> None:
    """Measure speed and memory of structures and executors beside nn.Linear, all in turns.

    Results are checked first, against the dense matrix in float64: a wrong one gets no speed-up, and the exit status 1.
    Running the same command again measures only what is missing.
    """
    import torch

    from einlinear.bench import changes, claims, plot, tables
    from einlinear.bench.cases import choose
    from einlinear.bench.results import read
    from einlinear.bench.run import FILE, Recorder

    with user_errors():
        grid = {
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
        past = None if compared is None else read(compared / FILE if compared.is_dir() else compared)
        chosen = choose(suite or "quick", **grid, executors=_words(executors), compiled=compiled, budget=budget)
        if past and suite is None and all(value is None for value in grid.values()):
            cases, settings = [result.case for result in past.results], past.settings
        else:
            cases, settings = chosen.cases(), chosen.settings
        folder = out or Path("results") / f"bench-{suite or ('compare' if past else 'quick')}"
        command = shlex.join(["einlinear", *sys.argv[1:]])
        recorder = Recorder(folder, cases, settings, command, fresh, reading=past is not None)

    with interruptible(f"Interrupted. {recorder.path} keeps every finished case; the same command goes on from there."):
        _measure(recorder)
    found = recorder.results
    (folder / "bench.md").write_text(tables.page(recorder.bench), encoding="utf-8")
    if find_spec("matplotlib"):
        plot.draw(recorder.bench.results, folder / "bench.png")
    else:
        display.warning("bench.png is drawn with matplotlib: pip install 'einlinear[experiments]'")

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
    console = Console()
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(missing))
        for case in missing:
            progress.update(task, description=str(case))
            recorder.measure(case)
            progress.advance(task)


def _print(found: Iterable[Table]) -> None:
    """Tables to the terminal, those that have rows; a pipe or file has no width to fit them into."""
    console = Console()
    console = console if console.is_terminal else Console(width=250)
    for table in found:
        if table.rows:
            rich = RichTable(
                title=Text(table.title), title_justify="left", box=None, pad_edge=False, header_style="bold"
            )
            for heading in table.headings:
                rich.add_column(heading, overflow="fold")
            for row in table.rows:
                rich.add_row(*map(Text, row))
            console.print(rich, "")


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
