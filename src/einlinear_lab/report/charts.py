"""Charts: traces and axes for plotly, with one look of colours, symbols, grid and ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup
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
    """Traces over two axes, from back to front; `height` is in pixels, `baseline` is a dotted horizontal line."""

    traces: Sequence[Trace]
    x: Axis
    y: Axis
    title: str = ""
    height: int = 460
    legend: bool = True
    baseline: float | None = None

    def html(self, id: str) -> Markup:
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
            # None: plotly decides
            "showlegend": None if self.legend else False,
        }
        figure = go.Figure(self.traces, layout)
        if self.baseline is not None:
            figure.add_hline(self.baseline, line={"color": colour(0), "width": 1, "dash": "dot"})
        config = {"responsive": True, "displaylogo": False, "displayModeBar": False}
        return Markup(figure.to_html(full_html=False, include_plotlyjs=False, div_id=id, config=config))


def trace(
    x: Iterable[Any],
    y: Iterable[Any],
    colour: str,
    hover: str = "",
    texts: Sequence[str] | None = None,
    *,
    symbol: str | Sequence[str] = "",
    line: float = 0,
    ranges: Sequence[tuple[float, float]] | None = None,
    **options: Any,
) -> Trace:
    """Return a series of points as markers (if there is a symbol), a line (of a width in pixels), or both.

    Args:
        x, y: coordinates; None leaves a gap.
        hover: plotly's template of the hover label, in which `%{customdata}` is the point's text.
        ranges: for every point, the ends of a vertical error bar.
        options: of plotly's Scatter. Traces of one name are shown and hidden together.
    """
    mode = "+".join(["lines"] * (line > 0) + ["markers"] * bool(symbol))
    label = {"hovertemplate": f"{hover}<extra></extra>"} if hover else {"hoverinfo": "skip"}
    shape: dict[str, Any] = {"type": "scatter", "x": list(x), "y": list(y), "mode": mode, "customdata": texts, **label}
    if symbol:
        shape |= {"marker_color": colour, "marker_symbol": symbol, "marker_size": 9}
    if line:
        shape |= {"line_color": colour, "line_width": line, "line_dash": "solid"}
    if ranges is not None:
        up = [max(0.0, high - value) for value, (_, high) in zip(shape["y"], ranges, strict=True)]
        down = [max(0.0, value - low) for value, (low, _) in zip(shape["y"], ranges, strict=True)]
        shape["error_y"] = {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1}
    return {**shape, "name": "", "legendgroup": options.get("name", ""), "showlegend": False, "opacity": 1, **options}


def axis(title: str, **options: Any) -> Axis:
    return {"title": {"text": title}, **options}


def log_axis(values: Iterable[float], title: str) -> Axis:
    """Return a logarithmic axis over all positive values, with round ticks."""
    shown = [value for value in values if value > 0]
    low, high = min(shown, default=0.1), max(shown, default=1.0)
    margin = 0.04 * math.log10(high / low) or 0.1
    ends, ticks = [math.log10(low) - margin, math.log10(high) + margin], nice_ticks(low, high)
    heading = {"text": title, "standoff": 8}
    return {"title": heading, "type": "log", "range": ends, "tickvals": ticks, "ticktext": list(map(short, ticks))}


def size_axis(name: str, sizes: Iterable[int]) -> Axis:
    """Return a logarithmic axis of a size such as the width, with a tick for each."""
    ticks = sorted({*sizes})
    return {
        "title": {"text": name.replace("_", " ")},
        "type": "log",
        "tickvals": ticks,
        "ticktext": list(map(str, ticks)),
    }


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
