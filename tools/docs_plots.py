"""Draw the pictures of the documentation from the numbers in docs/benchmarks, readable on light and dark pages."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

DOCS = Path(__file__).parent.parent / "docs"
COLORS = {"dense": "#727c87", "btt": "#2f81f7", "monarch": "#2da44e", "low_rank": "#d4572a", "kronecker": "#a371f7"}
INK = "#727c87"
STYLE = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "figure.dpi": 160,
    "font.size": 11,
    "savefig.transparent": True,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def main() -> None:
    """Draw every picture."""
    with plt.rc_context(STYLE):
        loss_against_compute()
        vision_transformers()
        fashion_mnist()
        lr_transfer()
        coordinate_check()
        dyad()
        compression()


def loss_against_compute() -> None:
    """Training error of residual MLPs against MACs: dense and BTT, with the compute that BTT saves."""
    figure, axes = plt.subplots(figsize=(6.4, 3.9), layout="constrained")
    curves = read("training/image-mlp.csv", "structure")
    for name in ("dense", "btt"):
        curve(axes, curves[name], "macs", "train_error", name, {"dense": "dense", "btt": "BTT"}[name])
    _compute_axis(axes, [0.12, 0.13, 0.14, 0.15, 0.16, 0.17], "training error", "{:.0%}")
    # dense reaches BTT's error at 339k MACs with 2.0 times as many (docs/results/image-scaling.md)
    point = next(row for row in curves["btt"] if row["width"] == "512")
    macs, error = float(point["macs"]), float(point["train_error"])
    axes.annotate("", (2.0 * macs, error), (macs, error), arrowprops={"arrowstyle": "<->", "color": INK, "shrinkA": 5})
    axes.text(2.15 * macs, error, "2.0× less compute", va="center", fontsize=10)
    save(figure, "loss-against-compute")


def vision_transformers() -> None:
    """Training error of vision transformers against MACs."""
    figure, axes = plt.subplots(figsize=(6.4, 3.9), layout="constrained")
    for name, rows in read("training/image-vit.csv", "structure").items():
        curve(axes, rows, "macs", "train_error", name.partition("(")[0], name.partition("(")[0])
    _compute_axis(axes, [0.17, 0.18, 0.19, 0.2, 0.21], "training error", "{:.0%}")
    save(figure, "vision-transformers")


def fashion_mnist() -> None:
    """Training loss of four structures against MACs."""
    figure, axes = plt.subplots(figsize=(6.4, 3.9), layout="constrained")
    for name, rows in read("training/fashion-mnist.csv", "structure").items():
        curve(axes, rows, "macs", "training_loss", name, name, rise=-10 if name == "btt" else 0)
    _compute_axis(axes, [0.35, 0.4, 0.45, 0.5], "training loss", "{:.2f}")
    save(figure, "fashion-mnist")


def lr_transfer() -> None:
    """Best learning rate by width, with the range over the seeds."""
    figure, axes = plt.subplots(figsize=(6.4, 3.9), layout="constrained")
    for name, rows in read("training/lr-transfer.csv", "curve").items():
        key = name.partition("(")[0].partition(",")[0]
        style = "--" if "rates" in name else "-"
        x, y = column(rows, "width"), column(rows, "lr")
        axes.plot(x, y, style, color=COLORS[key], marker="o", markersize=4, label=name)
        axes.vlines(x, column(rows, "smallest"), column(rows, "largest"), color=COLORS[key], alpha=0.35)
    logarithmic(axes, [64, 128, 256, 512, 1024], [0.001, 0.002, 0.005, 0.01, 0.02], "{:g}", "{:g}")
    axes.set(xlabel="width", ylabel="best learning rate")
    axes.set_ylim(0.0009, 0.045)
    axes.legend(frameon=False, labelcolor=INK, ncols=3, loc="upper left", fontsize=10)
    save(figure, "lr-transfer")


def coordinate_check() -> None:
    """Relative feature update by width: structure-aware learning rates beside those of dense layers."""
    figure, panels = plt.subplots(1, 2, figsize=(7.6, 3.6), sharey=True, layout="constrained")
    for axes, (rates, rows) in zip(panels, read("training/coordinate-check.csv", "rates").items(), strict=True):
        for name in dict.fromkeys(row["structure"] for row in rows):
            points = [row for row in rows if row["structure"] == name]
            x, y = column(points, "width"), column(points, "update")
            axes.plot(x, y, color=COLORS[name], marker="o", markersize=4, label=name)
        logarithmic(axes, [64, 256, 1024], [0.01, 0.02, 0.05, 0.1, 0.2], "{:g}", "{:g}")
        axes.set(xlabel="width", title={"dense": "rates of dense layers"}.get(rates, "structure-aware rates"))
    panels[0].set_ylabel("relative feature update")
    panels[0].legend(frameon=False, labelcolor=INK, loc="lower left")
    save(figure, "coordinate-check")


def dyad() -> None:
    """Validation loss of Pythia with DYAD or dense feed-forward layers against the duration of a training step."""
    figure, axes = plt.subplots(figsize=(6.4, 3.9), layout="constrained")
    markers = {"dense": "o", "IT, 4 blocks": "s", "OT, 4 blocks": "^", "DT, 4 blocks": "v", "IT, 8 blocks": "D"}
    for name, rows in read("training/dyad.csv", "layers").items():
        color = COLORS["dense" if name == "dense" else "btt"]
        label = name if name == "dense" else f"DYAD-{name}"
        axes.scatter(column(rows, "ms_per_step"), column(rows, "loss"), color=color, marker=markers[name], label=label)
    axes.set(xlabel="ms per training step", ylabel="validation loss")
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, labelcolor=INK)
    save(figure, "dyad")


def compression() -> None:
    """Cosine similarity to the original sentence embeddings against the fraction of parameters kept."""
    figure, axes = plt.subplots(figsize=(6.4, 3.9), layout="constrained")
    lines = (DOCS / "benchmarks/compression/sentence-encoder.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["structures"] == "blast"]
    for how, color, label in (("aware", "btt", "fitted to outputs"), ("plain", "dense", "fitted to weights")):
        for stage, style, suffix in (("after", "-", ", distilled"), ("before", "--", "")):
            points = sorted((row["budget"], row[stage]["cosine"]) for row in rows if row["how"] == how)
            x, y = zip(*points, strict=True)
            axes.plot(x, y, style, color=COLORS[color], marker="o", markersize=4, label=label + suffix)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set(xlabel="parameters kept", ylabel="cosine similarity", xticks=[0.3, 0.5, 0.7], ylim=(0.3, 1))
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, labelcolor=INK, loc="lower right")
    save(figure, "compression")


def read(file: str, key: str) -> dict[str, list[dict[str, str]]]:
    """Rows of a CSV file in docs/benchmarks, grouped by one column."""
    groups: dict[str, list[dict[str, str]]] = defaultdict(list)
    with (DOCS / "benchmarks" / file).open(encoding="utf-8", newline="") as text:
        for row in csv.DictReader(text):
            groups[row[key]].append(row)
    return groups


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    """One column as numbers."""
    return [float(row[name]) for row in rows]


def curve(axes: Any, rows: list[dict[str, str]], x: str, y: str, color: str, label: str, rise: int = 0) -> None:
    """A line with markers, and its name at the right end, `rise` points above it."""
    xs, ys = column(rows, x), column(rows, y)
    axes.plot(xs, ys, color=COLORS[color], marker="o", markersize=5, linewidth=2)
    axes.annotate(label, (xs[-1], ys[-1]), (8, rise), textcoords="offset points", color=COLORS[color], va="center")


def logarithmic(axes: Any, x_ticks: list[float], y_ticks: list[float], x_format: str, y_format: str) -> None:
    """Two logarithmic axes with exactly these ticks."""
    axes.set(xscale="log", yscale="log")
    for axis, ticks, text in ((axes.xaxis, x_ticks, x_format), (axes.yaxis, y_ticks, y_format)):
        axis.set_ticks(ticks)
        axis.set_major_formatter(FuncFormatter(lambda value, _, text=text: text.format(value)))
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.2)


def _compute_axis(axes: Any, y_ticks: list[float], label: str, y_format: str) -> None:
    low, high = axes.get_xlim()
    ticks = [tick for tick in (5e4, 1e5, 2e5, 5e5, 1e6, 2e6, 5e6, 1e7, 2e7) if low < tick < high]
    logarithmic(axes, ticks, y_ticks, "{:g}", y_format)
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k")
    )
    axes.set(xlabel="MACs per image", ylabel=label)
    axes.margins(x=0.16)


def save(figure: Any, name: str) -> None:
    """Write a picture into docs/images."""
    figure.savefig(DOCS / "images" / f"{name}.png")
    plt.close(figure)


if __name__ == "__main__":
    main()
