"""`einlinear bench`: options and printed tables."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import torch
import typer

from einlinear_lab.cli import display
from einlinear_lab.cli.parsing import numbers, specs, words
from einlinear_lab.cli.running import command_line, refuse

if TYPE_CHECKING:  # heavy: imported by the command itself
    from einlinear_lab.bench.benchmark import Benchmark
    from einlinear_lab.bench.run import Recorder
    from einlinear_lab.bench.tables import Table

T = TypeVar("T")
C = TypeVar("C")
R = TypeVar("R")
# options whose flags have other names
_FLAGS = {"modes": "--passes", "dtypes": "--dtype", "cold": "--cold/--warm", "compiled": "--compile"}
_FLAGS |= {"compared": "--compare"}
BLOCKS = "blocks"


def bench_command(
    suite: str | None = None,
    structures: list[str] | None = None,
    sizes: str | None = None,
    tokens: str | None = None,
    passes: str | None = None,
    dtypes: Annotated[str | None, typer.Option("--dtype")] = None,
    device: str | None = None,
    bias: bool | None = None,
    backends: str | None = None,
    cold: Annotated[bool | None, typer.Option("--cold/--warm")] = None,
    compiled: Annotated[bool | None, typer.Option("--compile/--no-compile")] = None,
    budget: Annotated[float | None, typer.Option(min=0)] = None,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    out: Path | None = None,
    fresh: Annotated[bool, typer.Option("--fresh")] = False,
    compared: Annotated[Path | None, typer.Option("--compare")] = None,
    variants: Annotated[bool, typer.Option("--variants")] = False,
    calibrate: Annotated[bool, typer.Option("--calibrate")] = False,
) -> None:
    """Measure speed and memory of structures and backends against nn.Linear, in interleaved rounds.

    Outputs and gradients are first checked against the dense matrix in float64: a wrong variant gets no speed-up, and
    the exit status is 1. The same command again measures only the missing cases.

    Args:
        suite: What to measure: quick (the default), small, standard (20 minutes on two cores), cpu (all dtypes, 64 to
            4096 features), gpu, blocks (feed-forward blocks), moe (mixtures of experts), projection (of a large
            weight). The other options override it.
        structures: Structures, separated by ';' (names of families also by ','); may be repeated. {d/8} stands for an
            eighth of the features.
        sizes: Features of the layers, or in x out, such as 1024,1024x4096; of blocks, features x hidden features.
        tokens: Input vectors at a time, such as 1,2048. Up to 16 are a decode pass, more a forward and a train pass.
        passes: Which of forward, train, decode to measure. Default: all.
        dtypes: Which of float32, bfloat16, float16.
        device: cpu or cuda.
        bias: Whether the layers have a bias. Default: no.
        backends: Backends to measure one by one, or none. Default: all that can run.
        cold: Whether the weights of a decode pass come from memory, as in a model, or from the caches. Default: from
            memory on a CPU, through a stack of layers larger than the caches.
        compiled: Whether to measure torch.compile of the einsum too.
        budget: Seconds that each case is repeated for. Cases that would take 200 times as long are left out.
        threads: CPU threads. Default: as many as torch takes.
        out: Results folder; what it lacks is measured. Default: results/bench-SUITE.
        fresh: Measure again what the results folder holds.
        compared: An earlier bench.json, or its folder: measure the same cases and show what changed.
        variants: Print a row for every variant, not only for el.Linear.
        calibrate: Measure this machine for half a minute, and keep the coefficients of the cost model that chooses
            backends in $EINLINEAR_CACHE, for this processor and these versions of torch and einlinear.
    """
    from einlinear_lab.bench import claims, plot, tables
    from einlinear_lab.bench.cases import choose
    from einlinear_lab.bench.mixtures import MixtureBenchmark
    from einlinear_lab.bench.projections import ProjectionBenchmark
    from einlinear_lab.bench.results import compare, read
    from einlinear_lab.bench.run import FILE, Recorder
    from einlinear_lab.runs.options import names

    others: dict[str, type[Benchmark[Any, Any]]] = {"moe": MixtureBenchmark, "projection": ProjectionBenchmark}
    with display.user_errors():
        grid: dict[str, Any] = {"structures": specs(structures), "sizes": _sizes(sizes), "device": device, "bias": bias}
        grid["cold"] = cold
        grid |= {"tokens": numbers(tokens, "--tokens"), "modes": words(passes), "dtypes": words(dtypes)}
        measuring: dict[str, Any] = {"backends": words(backends), "compiled": compiled, "budget": budget}
        if threads is not None:
            torch.set_num_threads(threads)
        no_meaning = f"has no meaning for --suite {suite}"
        if suite in others:
            of_layers = {"variants": variants or None, "compared": compared, "calibrate": calibrate or None}
            options = {name: value for name, value in (grid | measuring | of_layers).items() if value is not None}
            without_effect = [name for name in options if name not in names(others[suite])]
            refuse({_FLAGS.get(name, f"--{name}"): options[name] for name in without_effect}, no_meaning)
            _run(suite, others[suite](**options), device, out)
            return
        if suite == BLOCKS:
            refuse({"--backends": backends, "--compile": compiled}, no_meaning)
        if calibrate:
            fixed = {"--suite": suite, "--passes": passes, "--dtype": dtypes, "--device": device, "--compare": compared}
            refuse({**fixed, "--bias": bias, "--backends": backends}, "has no meaning with --calibrate")
            suite, fresh = "calibration", True
        past = None if compared is None else read(compared / FILE if compared.is_dir() else compared)
        chosen = choose(suite or "quick", **grid, **measuring)
        if past and suite is None and all(value is None for value in grid.values()):
            all_cases, config = [result.case for result in past.results], past.config
        else:
            all_cases, config = chosen.cases(), chosen.config
        folder = out or Path("results") / f"bench-{suite or ('compare' if past else 'quick')}"
        recorder = Recorder(folder, all_cases, config, command_line(), fresh=fresh, reading=past is not None)
        if not recorder.results and not recorder.missing:
            raise ValueError(f"every case would take longer than {recorder.limit:.0f} seconds; give a larger --budget")

    with display.interruptible(f"Interrupted. {recorder.path} holds every finished case; the same command resumes."):
        _measure(recorder)
    results = recorder.results
    (folder / "bench.md").write_text(tables.page(recorder.bench), encoding="utf-8")
    if find_spec("matplotlib"):
        plot.draw(recorder.bench.results, folder / "bench.png")
    else:
        display.warning("bench.png is drawn with matplotlib: pip install 'einlinear[lab]'")

    _print(tables.details(results) if variants else tables.summary(results))
    verdicts = [verdict for verdict in claims.judge(results) if verdict.values]
    judgements = tables.conclusions(verdicts), tables.misses(verdicts)
    _print([tables.refusals(results), *judgements, tables.dense_wins(results)])
    if past:
        for difference in recorder.bench.differences(past):
            display.note(f"Differs from {compared}: {difference}")
        _print([tables.changed(compare(past, results))])
    display.note(f"Results: {recorder.path}, with bench.md and bench.png.")
    if calibrate:
        with display.user_errors():
            # takes scipy
            from einlinear_lab.bench import fit_costs

            before, *_ = fit_costs.summary([recorder.bench])
            file = fit_costs.calibrate(recorder.bench)
        for line in (f"Before: {before}", *fit_costs.summary([recorder.bench])):
            display.note(line)
        display.note(f"Coefficients of the cost model: {file}. Processes that start from now on use them.")
    display.fail([f"{result.case}, {m.name}: {m.refusal}" for result in results for m in result.failures])


def _run(suite: str, benchmark: Benchmark[C, R], device: str | None, out: Path | None) -> None:
    """Measure all cases of another benchmark than that of layers. A case that fails does not stop the others."""
    from einlinear_lab.bench.machine import this_machine
    from einlinear_lab.bench.tables import write_results

    folder, machine = out or Path("results") / f"bench-{suite}", this_machine(device or "cpu")
    display.note(str(machine))
    results, failures = [], []
    for name, case in _with_bar([(str(case), case) for case in benchmark.cases()]):
        try:
            results.append(benchmark.measure(case))
        except RuntimeError as error:
            failures.append(f"{name}: {error}")
    # the files of an earlier benchmark stay if everything fails
    if results:
        folder.mkdir(parents=True, exist_ok=True)
        tables, path = benchmark.tables(results), folder / benchmark.FILE
        write_results(path, benchmark.TITLE, machine, command_line(), results, tables)
        _print(tables)
        display.note(f"Results: {path}, with {path.with_suffix('.md').name}.")
    display.fail(failures)


def _measure(recorder: Recorder) -> None:
    """Measure the missing cases, with a progress bar."""
    missing, slow = recorder.missing, recorder.too_slow
    display.note(str(recorder.bench.machine))
    if slow:
        reason = f"take longer than {recorder.limit:.0f} seconds each; a larger --budget measures them"
        display.warning(f"{len(slow)} cases are left out, because they would {reason}: {slow[0]}, ...")
    if not missing and not slow:
        display.note(f"{recorder.path} has all cases already; --fresh measures them again.")
        return
    seconds = recorder.estimate()
    duration = f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
    count = f"{len(missing)} of {len(recorder.cases)} cases"
    display.note(f"{count} to measure, about {duration}; results in {recorder.path}.")
    for _, case in _with_bar([(str(case), case) for case in missing]):
        recorder.measure(case)


def _with_bar(named: Collection[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """Yield all items, with a progress bar of their names."""
    with display.progress() as progress:
        task = progress.add_task("", total=len(named))
        for name, item in named:
            progress.update(task, description=name)
            yield name, item
            progress.advance(task)


def _print(tables: Iterable[Table]) -> None:
    """Print the tables that have rows."""
    for table in tables:
        if table.rows:
            display.show(table.headings, table.rows, table.title, prose=True)
            display.note("")


def _sizes(text: str | None) -> tuple[tuple[int, int], ...] | None:
    """ "1k,1024x4096" -> ((1000, 1000), (1024, 4096))."""
    pairs = []
    for word in words(text) or ():
        pair = numbers(word.replace("x", ","), "--sizes") or ()
        if len(pair) not in (1, 2):
            raise ValueError(f"--sizes: {word!r} is no size; write 1024, or 1024x4096 for in x out")
        pairs.append((pair[0], pair[-1]))
    return None if text is None else tuple(pairs)
