"""How soon a search finds a good structure: the predictor, chance, and the 23 structures of arXiv 2410.02117.

    pip install 'einlinear[experiments,search]'
    python examples/search_regret.py

All train the same kind of model at the same budget of MACs. Searches are repeated with other seeds; the 23 structures
are taken in random orders. The regret after some compute is how much higher the least error found by then is than the
least that any way has found in the same repetition, whose runs all see the same batches. Everything is kept in a
folder, and goes on after an interruption.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from statistics import fmean, stdev

import plotly.graph_objects as go
from rich.console import Console
from rich.progress import Progress
from scipy.stats import t

from einlinear.structures.spec import parse_family
from einlinear_lab.runs.records import METRICS
from einlinear_lab.runs.run import Run
from einlinear_lab.runs.store import Store
from einlinear_lab.search.matching import at
from einlinear_lab.search.search import Config, Search
from einlinear_lab.search.space import STRUCTURE, Proposal, Theta
from einlinear_lab.sweeps import recipes
from einlinear_lab.sweeps.driver import do
from einlinear_lab.sweeps.workers import Workers
from einlinear_lab.training import metrics

OPTIONS = {"depth": 3, "permute": True, "mixup": 0.8, "label_smoothing": 0.3, "betas": (0.9, 0.999), "lr": 3e-3}
PAPERS = "the paper's 23"
# how candidates are chosen, whether those of the literature come first and runs end early, and how many trials are
# needed for a whole run's worth of MACs each
WAYS = {
    "predictor": ("predictor", False, False, 1),
    "predictor, known first, pruned": ("predictor", True, True, 2),
    "random": ("random", False, False, 1),
}
ORDERS = 200  # of the paper's structures, over which their curve is averaged
SHOWN = (4, 8, 12, 16, 20)

Curve = list[float]  # the least error after a whole run's worth of MACs, after two, ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--budget", type=int, default=100_000, help="MACs of every model, for one image")
    parser.add_argument("--steps", type=int, default=300, help="of every training")
    parser.add_argument("--runs", type=int, default=23, help="whole trainings that every way may cost")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/search-regret"))
    arguments = parser.parse_args()

    curves: dict[str, list[Curve]] = {}
    with Progress(console=Console(stderr=True)) as bars:
        bar = bars.add_task("repetitions", total=arguments.repeats * (len(WAYS) + 1))
        for repeat in range(arguments.repeats):
            folder = arguments.out / f"repeat-{repeat}"
            options = {**OPTIONS, "data": arguments.data, "steps": arguments.steps, "batch_size": 256, "seed": repeat}
            for name, (sampler, known, prune, times) in WAYS.items():
                trials = times * arguments.runs
                search = Search(
                    Config(
                        budget=arguments.budget,
                        trials=trials,
                        sampler=sampler,
                        known=known,
                        prune=prune,
                        seed=repeat,
                        options=options,
                    )
                )
                search.open(Store(folder / name.replace(", ", "-").replace(" ", "-"))).do(Workers(arguments.workers))
                runs = [own.run for own in search.study.tried()]
                curves.setdefault(name, []).append(curve(search.store, runs, arguments.runs))
                bars.advance(bar)
            store, runs = Store(folder / "paper"), [at_budget(spec, search) for spec in papers()]
            store.open(runs, search.config.axes)
            do(runs, store, Workers(arguments.workers))
            orders = [random.Random(order).sample(runs, len(runs)) for order in range(ORDERS)]
            every = [curve(store, order, arguments.runs) for order in orders]
            curves.setdefault(PAPERS, []).append([fmean(errors) for errors in zip(*every, strict=True)])
            bars.advance(bar)

    least = [min(each[repeat][-1] for each in curves.values()) for repeat in range(arguments.repeats)]
    regrets = {
        name: [[error - least[repeat] for error in each[repeat]] for repeat in range(arguments.repeats)]
        for name, each in curves.items()
    }
    print(table(regrets))
    plot(regrets).write_html(arguments.out / "regret.html", config={"displayModeBar": False})


def papers() -> list[str]:
    """The two-factor einsums that the paper trained."""
    parts = recipes.load("char-gpt").paper.parts
    return [spec for part in parts for spec in part.get("grid", {}).get("structure", ())]


def at_budget(spec: str, search: Search) -> Run:
    """The run of a structure that costs what the search's candidates do, its rank moved by as little as that takes."""
    theta = Theta(*map(Fraction, parse_family(spec)[1]["theta"]))
    found = search.matching.match({STRUCTURE: Proposal("einsum", theta, rho=theta.rho)})
    return replace(search.base, model=at(search.base.model, found.width, found.specs))


def curve(store: Store, runs: Sequence[Run], length: int) -> Curve:
    """The least error of whole runs, in the order of their beginnings; those that ended early have cost as well."""
    results = {record.run.key: record.result for record in store.records()}
    spent, least, found = 0.0, float("inf"), []
    for run in runs:
        result = results[run.key]
        spent += 1.0 if result else min(1.0, _seen(store.path(run), run) / run.training.steps)
        if result and result.error is not None:
            least = min(least, result.error)
        found.append((spent, least))
    return [
        min((least for spent, least in found if spent <= n + 1e-9), default=float("inf")) for n in range(1, length + 1)
    ]


def _seen(folder: Path, run: Run) -> int:
    """The steps of a run that ended early, at most: it was on its way to the next that is noted."""
    return max(line["step"] for line in metrics.read(folder / METRICS)) + run.training.log_every


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half of its 95 % interval."""
    half = t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return fmean(values), float(half)


def table(regrets: dict[str, list[Curve]]) -> str:
    """In Markdown."""
    lines = ["| runs' worth of MACs | " + " | ".join(regrets) + " |", "| --- |" + " --- |" * len(regrets)]
    for n in SHOWN:
        ends = [interval([each[n - 1] for each in curves]) for curves in regrets.values() if len(curves[0]) >= n]
        if ends:
            lines.append(f"| {n} | " + " | ".join(f"{mean:.4f} ± {half:.4f}" for mean, half in ends) + " |")
    return "\n".join(lines)


def plot(regrets: dict[str, list[Curve]]) -> go.Figure:
    figure = go.Figure()
    top = 0.0  # of what is drawn: after a few runs, before which it may be anything
    for (name, curves), colour in zip(regrets.items(), ("#0072B2", "#009E73", "#D55E00", "#000000"), strict=False):
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
    figure.update_xaxes(title="whole runs' worth of MACs")
    figure.update_yaxes(title="regret: training error above the least found", range=[0, top or None])
    return figure


if __name__ == "__main__":
    main()
