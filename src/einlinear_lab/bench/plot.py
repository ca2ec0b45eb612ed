"""The plot of a benchmark: the speed-up over nn.Linear against the reduction of MACs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from einlinear_lab.bench.cases import MODES
from einlinear_lab.bench.results import BenchResult
from einlinear_lab.bench.variants import COPYING, OURS

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes


def draw(results: Sequence[BenchResult], path: Path) -> None:
    """Draw a panel per pass, at the largest number of tokens of each size, and save them as PNG."""
    from matplotlib import rcParams, style
    from matplotlib.figure import Figure

    modes = [mode for mode in MODES if any(result.case.mode == mode for result in results)]
    families = dict.fromkeys(map(_family, results))
    with style.context("tableau-colorblind10"):
        colours = dict(zip(families, cycle(rcParams["axes.prop_cycle"].by_key()["color"])))
        figure = Figure(figsize=(max(8, 4.6 * len(modes)), 5), layout="constrained")
        panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
        handles: dict[str, Artist] = {}
        for mode, panel in zip(modes, panels, strict=True):
            handles |= _draw_mode(panel, [result for result in results if result.case.mode == mode], colours)
        panels[0].set_ylabel("speed-up over nn.Linear")
        figure.legend([*handles.values()], [*handles], loc="outside lower center", ncols=min(8, len(handles)))
        is_block = results[0].case.is_block
        hollow = "el.Linear one after the other" if is_block else "copying baseline"
        marks = f"full: {results[0].ours}, hollow: {hollow}, larger: more features, line: the MAC limit"
        figure.suptitle(marks, fontsize="medium")
        figure.savefig(path, dpi=120)


def _draw_mode(panel: Axes, results: Sequence[BenchResult], colours: dict[str, str]) -> dict[str, Artist]:
    """Fill the panel of one pass, and return the legend handle of each structure."""
    by_size: dict[str, int] = {}
    for result in results:
        by_size[result.case.size] = max(result.case.tokens, by_size.get(result.case.size, 0))
    largest = [result for result in results if result.case.tokens == by_size[result.case.size]]
    handles: dict[str, Artist] = {}
    for family, colour in colours.items():
        of_family = [result for result in largest if _family(result) == family]
        hollow = OURS if results[0].case.is_block else COPYING
        for name, face in ((hollow, "none"), (results[0].ours, colour)):
            speedups = [(r, m.speedup.median) for r in of_family if (m := r.of(name)) and m.speedup]
            points = [(r.limit, speedup, 16 * (r.case.dense_macs / 2**18) ** 0.4) for r, speedup in speedups]
            columns = zip(*points) if points else ((), (), ())
            handles[family] = panel.scatter(*columns, facecolors=face, edgecolors=colour)
    end = max(result.limit for result in largest)
    panel.plot([1, end], [1, end], color="0.5", linewidth=1, zorder=0)
    panel.axhline(1, color="0.5", linewidth=1, linestyle=":", zorder=0)
    panel.set(xscale="log", yscale="log", xlabel="MACs of nn.Linear / MACs of the structure")
    tokens = " or ".join(str(count) for count in sorted({*by_size.values()}))
    panel.set_title(f"{largest[0].case.mode}, {tokens} tokens")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_major_formatter("{x:g}")
    return handles


def _family(result: BenchResult) -> str:
    """Return the structure's spec, or one name for all low ranks, whose rank grows with the features."""
    spec = result.case.structure
    return "low_rank" if spec.startswith("low_rank") else spec
