"""How soon a search finds a good structure: Optuna's samplers, chance, and the 23 structures of arXiv 2410.02117.

    pip install 'einlinear[lab]'
    python benchmarks/search_regret.py

All train the same kind of model at the same budget of MACs. Searches are repeated with several seeds; the 23 structures
are taken in random orders. The regret after some compute is the lowest error so far minus the lowest error of all
methods in the same repetition, whose runs all see the same batches. Everything is stored in a folder, and resumes after
an interruption.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import plotly.graph_objects as go
from rich.console import Console
from rich.progress import Progress
from scipy.stats import t

from einlinear.structures.spec import parse_family
from einlinear_lab.pools.local import LocalPool
from einlinear_lab.pools.pool import run_missing
from einlinear_lab.runs.records import METRICS
from einlinear_lab.runs.run import Run
from einlinear_lab.runs.store import Store
from einlinear_lab.search.config import SearchConfig
from einlinear_lab.search.search import Search
from einlinear_lab.search.space import STRUCTURE, Proposal, Theta
from einlinear_lab.sweeps import recipes
from einlinear_lab.training import metrics

OPTIONS = {"depth": 3, "permute": True, "mixup": 0.8, "label_smoothing": 0.3, "betas": (0.9, 0.999), "lr": 3e-3}
PAPER = "the paper's 23"


class Method(NamedTuple):
    """A sampler, with or without warm start and pruning."""

    sampler: str
    assisted: bool = False

    @property
    def trials_per_run(self) -> int:
        """The number of trials that cost the MACs of one complete run, at least."""
        return 2 if self.assisted else 1


METHODS = {
    "random": Method("random"),
    "gp": Method("gp"),
    "tpe": Method("tpe"),
    "gp, warm start, pruned": Method("gp", assisted=True),
    "tpe, warm start, pruned": Method("tpe", assisted=True),
}
# Random orders of the paper's structures, over which their curve is averaged.
ORDERS = 200
# Rows of the table.
SHOWN = (4, 8, 12, 16, 20)

# The lowest error after the MACs of one complete run, of two, ...
Curve = list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--budget", type=int, default=100_000, help="MACs of every model, for one image")
    parser.add_argument("--steps", type=int, default=300, help="training steps of every run")
    parser.add_argument("--runs", type=int, default=23, help="compute of every method, in complete runs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/search-regret"))
    arguments = parser.parse_args()

    curves: dict[str, list[Curve]] = {}
    with Progress(console=Console(stderr=True)) as bars:
        bar = bars.add_task("repetitions", total=arguments.repeats * (len(METHODS) + 1))
        for repeat in range(arguments.repeats):
            folder = arguments.out / f"repeat-{repeat}"
            options = {**OPTIONS, "data": arguments.data, "steps": arguments.steps, "batch_size": 256, "seed": repeat}
            for name, method in METHODS.items():
                config = SearchConfig(
                    budget=arguments.budget,
                    trials=method.trials_per_run * arguments.runs,
                    sampler=method.sampler,
                    warm_start=method.assisted,
                    prune=method.assisted,
                    seed=repeat,
                    options=options,
                )
                search = Search(config).open(Store(folder / name.replace(", ", "-").replace(" ", "-")))
                search.run_trials(LocalPool(arguments.workers))
                runs = [trial.run for trial in search.study.trained()]
                curves.setdefault(name, []).append(curve(search.store, runs, arguments.runs))
                bars.advance(bar)
            store, runs = Store(folder / "paper"), [at_budget(spec, search) for spec in paper_specs()]
            store.open(runs, search.config.axes)
            run_missing(runs, store, LocalPool(arguments.workers))
            orders = [random.Random(order).sample(runs, len(runs)) for order in range(ORDERS)]
            shuffled = [curve(store, order, arguments.runs) for order in orders]
            curves.setdefault(PAPER, []).append([fmean(errors) for errors in zip(*shuffled, strict=True)])
            bars.advance(bar)

    lowest = [min(repeats[repeat][-1] for repeats in curves.values()) for repeat in range(arguments.repeats)]
    regrets = {
        name: [[error - least for error in errors] for errors, least in zip(repeats, lowest, strict=True)]
        for name, repeats in curves.items()
    }
    print(table(regrets))
    plot(regrets).write_html(arguments.out / "regret.html", config={"displayModeBar": False})


def paper_specs() -> list[str]:
    """Return the two-factor einsums that the paper trained."""
    parts = recipes.load("char-gpt").paper.parts
    return [spec for part in parts for spec in part.get("grid", {}).get("structure", ())]


def at_budget(spec: str, search: Search) -> Run:
    """Return the run of a structure at the budget of a search, with the nearest rank that makes it fit."""
    theta = Theta(*map(Fraction, parse_family(spec)[1]["theta"]))
    architecture = search.matching.match({STRUCTURE: Proposal("einsum", theta, rho=theta.rho)})
    return replace(search.base, model=architecture.model(search.base.model))


def curve(store: Store, runs: Sequence[Run], length: int) -> Curve:
    """Return the lowest error of complete runs, in the order of their starts. Pruned runs have cost MACs as well."""
    records = {record.run.key: record for record in store.records()}
    spent, lowest, points = 0.0, float("inf"), []
    for run in runs:
        record = records[run.key]
        result = record.result
        spent += 1.0 if result else min(1.0, _steps_of_pruned(store.path(run), run) / run.training.steps)
        if result and record.metric in result.metrics:
            lowest = min(lowest, result.metrics[record.metric])
        points.append((spent, lowest))
    return [
        min((lowest for spent, lowest in points if spent <= n + 1e-9), default=float("inf"))
        for n in range(1, length + 1)
    ]


def _steps_of_pruned(folder: Path, run: Run) -> int:
    """Return the largest possible number of steps of a pruned run: it may have gone on until its next log."""
    return int(max(line["step"] for line in metrics.read(folder / METRICS))) + run.training.log_every


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and half of its 95 % interval."""
    half = t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return fmean(values), float(half)


def table(regrets: dict[str, list[Curve]]) -> str:
    """Return the regrets as a table in Markdown."""
    lines = ["| MACs, in complete runs | " + " | ".join(regrets) + " |", "| --- |" + " --- |" * len(regrets)]
    for n in SHOWN:
        ends = [interval([each[n - 1] for each in curves]) for curves in regrets.values() if len(curves[0]) >= n]
        if ends:
            lines.append(f"| {n} | " + " | ".join(f"{mean:.4f} ± {half:.4f}" for mean, half in ends) + " |")
    return "\n".join(lines)


def plot(regrets: dict[str, list[Curve]]) -> go.Figure:
    figure = go.Figure()
    # The highest regret after a few runs, before which it may be anything.
    top = 0.0
    colours = ("#999999", "#0072B2", "#009E73", "#56B4E9", "#D55E00", "#000000")
    for (name, curves), colour in zip(regrets.items(), colours, strict=False):
        ends = [(n, *interval(errors)) for n, errors in enumerate(zip(*curves, strict=True), 1) if max(errors) < 1]
        x = [n for n, *_ in ends]
        top = max([top, *(mean + half for n, mean, half in ends if n >= SHOWN[0])])
        edge = [mean + half for _, mean, half in ends] + [mean - half for _, mean, half in reversed(ends)]
        figure.add_scatter(
            x=x + x[::-1], y=edge, fill="toself", fillcolor=colour, opacity=0.15, line_width=0, showlegend=False
        )
        figure.add_scatter(x=x, y=[mean for _, mean, _ in ends], name=name, line={"color": colour}, mode="lines")
    legend = {"orientation": "h", "y": 1.15}
    figure.update_layout(template="simple_white", width=760, height=420, legend=legend)
    figure.update_xaxes(title="MACs of training, in complete runs")
    figure.update_yaxes(title="regret: training error above the lowest", range=[0, top or None])
    return figure


if __name__ == "__main__":
    main()
