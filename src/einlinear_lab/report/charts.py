"""Charts: traces and axes for plotly, with one look of colours, symbols, grid and ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plotly.colors import sample_colorscale

Axis = Mapping[str, Any]
Trace = Mapping[str, Any]

# The palette of Okabe and Ito, which colour-blind readers can tell apart; yellow, weak on white, comes last.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "star", "x", "pentagon")
# the same symbols as text
_GLYPHS = "●■◆▲✚▼★✖⬟"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


@dataclass(frozen=True)
class Chart:
    """Traces over two axes.

    Attributes:
        traces: from back to front, see `trace`.
        x, y: the axes, see `axis`, `log_axis` and `width_axis`.
        title: the heading above the chart; may be empty.
        height: in pixels.
        legend: whether the chart has a legend.
        baseline: where to draw a dotted horizontal line.
    """

    traces: Sequence[Trace]
    x: Axis
    y: Axis
    title: str = ""
    height: int = 460
    legend: bool = True
    baseline: float | None = None

    @property
    def plotly(self) -> dict[str, Any]:
        """The figure as plotly reads it."""
        both = {"gridcolor": "#e5e5e5", "linecolor": "#555", "ticks": "outside", "zeroline": False, "automargin": True}
        layout: dict[str, Any] = {
            "template": "none",
            "font": {"family": _FONT, "size": 13, "color": "#222"},
            "margin": {"l": 60, "r": 12, "t": 12, "b": 60},
            "height": self.height,
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            "hoverlabel": {"font": {"family": _FONT}},
            "dragmode": False,
            "xaxis": {**both, **self.x},
            "yaxis": {**both, **self.y},
        }
        if not self.legend:
            layout["showlegend"] = False
        if self.baseline is not None:
            ends = {"xref": "x domain", "x0": 0, "x1": 1, "y0": self.baseline, "y1": self.baseline}
            layout["shapes"] = [{"type": "line", **ends, "line": {"color": colour(0), "width": 1, "dash": "dot"}}]
        return {"data": list(self.traces), "layout": layout}


def trace(
    x: Iterable[Any],
    y: Iterable[Any],
    colour: str,
    hover: str = "",
    texts: Sequence[str] | None = None,
    *,
    name: str = "",
    legend: bool = False,
    symbol: str | Sequence[str] = "",
    size: int = 9,
    outline: int = 0,
    line: float = 0,
    dash: str = "solid",
    opacity: float = 1,
    ranges: Sequence[tuple[float, float]] | None = None,
) -> Trace:
    """Return a series of points as markers, a line, or both.

    Args:
        x, y: coordinates; None leaves a gap.
        colour: of markers and line.
        hover: plotly's template of the hover label; empty for no label.
        texts: for every point, the `%{customdata}` of the template.
        name: the legend entry; traces of one name are shown and hidden together.
        legend: whether this trace has the legend entry.
        symbol: of the markers; empty for no markers.
        size, outline: size of the markers and width of their outline, in pixels; 0 for plotly's own outline.
        line: width of the line, in pixels; 0 for no line.
        dash: plotly's dash style of the line.
        opacity: from 0 to 1.
        ranges: for every point, the ends of a vertical error bar.
    """
    x, y = list(x), list(y)
    mode = "+".join(["lines"] * (line > 0) + ["markers"] * bool(symbol))
    label = {"hovertemplate": f"{hover}<extra></extra>"} if hover else {"hoverinfo": "skip"}
    shape: dict[str, Any] = {"type": "scatter", "x": x, "y": y, "mode": mode, "opacity": opacity, **label}
    if symbol:
        shape["marker"] = {"color": colour, "symbol": symbol, "size": size}
    if outline:
        shape["marker"]["line"] = {"width": outline}
    if line:
        shape["line"] = {"color": colour, "width": line, "dash": dash}
    if texts is not None:
        shape["customdata"] = list(texts)
    if ranges is not None:
        up = [max(0.0, high - value) for value, (_, high) in zip(y, ranges, strict=True)]
        down = [max(0.0, value - low) for value, (low, _) in zip(y, ranges, strict=True)]
        shape["error_y"] = {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1}
    return shape | {"name": name, "legendgroup": name, "showlegend": legend}


def axis(title: str, **options: Any) -> Axis:
    """Return a linear axis with these further options of plotly."""
    return {"title": {"text": title}, **options}


def log_axis(values: Iterable[float], title: str) -> Axis:
    """Return a logarithmic axis over all positive values, with round ticks."""
    shown = [value for value in values if value > 0]
    low, high = min(shown, default=0.1), max(shown, default=1.0)
    margin = 0.04 * math.log10(high / low) or 0.1
    ticks = nice_ticks(low, high)
    return {
        "title": {"text": title, "standoff": 8},
        "type": "log",
        "range": [math.log10(low) - margin, math.log10(high) + margin],
        "tickvals": ticks,
        "ticktext": [short(tick) for tick in ticks],
    }


def width_axis(widths: Iterable[int]) -> Axis:
    """Return a logarithmic axis with a tick at every width."""
    ticks = sorted({*widths})
    return {"title": {"text": "width"}, "type": "log", "tickvals": ticks, "ticktext": [str(width) for width in ticks]}


def nice_ticks(low: float, high: float) -> list[float]:
    """Return about four to eight round values from below low to above high, for a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    if high / low > 8:
        # 1, 2, 5, 10, ...; or 1, 10, 100, ...
        ticks = [m * 10.0**e for e in decades for m in ((1, 2, 5) if high / low < 500 else (1,))]
    else:
        steps = (m * 10.0**e for e in range(decades.start - 6, decades.stop) for m in (1, 2, 5))
        step = next(step for step in steps if (high - low) / step <= 6)
        ticks = [step * k for k in range(max(1, math.floor(low / step)), math.ceil(high / step) + 1)]
    return [float(f"{tick:.6g}") for tick in ticks]


def colour(i: int) -> str:
    """Return the colour of the i-th curve: black for dense, the first; the others repeat, with different symbols."""
    return _COLOURS[0] if i == 0 else _COLOURS[1 + (i - 1) % (len(_COLOURS) - 1)]


def symbol(i: int) -> str:
    """Return the marker symbol of the i-th curve."""
    return _SYMBOLS[i % len(_SYMBOLS)]


def glyph(i: int) -> str:
    """Return the marker symbol of the i-th curve as a character."""
    return _GLYPHS[i % len(_GLYPHS)]


def shade(i: int, count: int) -> str:
    """Return the colour of the i-th of ordered items, such as widths: dark to light, also for colour-blind readers."""
    # the last tenth of the scale is a yellow, weak on white
    return str(sample_colorscale("Viridis", [0.9 * i / max(1, count - 1)])[0])


def short(number: float) -> str:
    """Return a number with a unit prefix: 50000 -> 50k."""
    for size, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{suffix}"
    return f"{number:g}"
