"""The look of all figures: colours, symbols, grid and ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

# The palette of Okabe and Ito, which colour-blind people can tell apart; yellow, weak on white, comes last.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "star", "x", "pentagon")
_GLYPHS = "●■◆▲✚▼★✖⬟"  # the same, for text

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def colour(i: int) -> str:
    """The colour of the i-th structure. The first, dense, is black; the others repeat, and symbols tell them apart."""
    return _COLOURS[0] if i == 0 else _COLOURS[1 + (i - 1) % (len(_COLOURS) - 1)]


def symbol(i: int) -> str:
    """The symbol of the i-th structure."""
    return _SYMBOLS[i % len(_SYMBOLS)]


def glyph(i: int) -> str:
    """The symbol of the i-th structure as a character."""
    return _GLYPHS[i % len(_GLYPHS)]


def style(figure: go.Figure) -> None:
    """The look of all figures: white, light grid, legend on top."""
    figure.update_layout(
        template="none",
        font={"family": _FONT, "size": 13, "color": "#222"},
        margin={"l": 60, "r": 12, "t": 12, "b": 60},
        height=460,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hoverlabel={"font": {"family": _FONT}},
        dragmode=False,
    )
    axis: dict[str, Any] = {
        "gridcolor": "#e5e5e5",
        "linecolor": "#555",
        "ticks": "outside",
        "zeroline": False,
        "automargin": True,
    }
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)


def nice_ticks(low: float, high: float) -> list[float]:
    """Round values from below low to above high for a logarithmic axis, about four to eight of them."""
    if high / low > 8:  # 1, 2, 5, 10, ...; or 1, 10, 100, ...
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [m * 10.0**e for e in exponents for m in ((1, 2, 5) if high / low < 500 else (1,))]
    else:
        step = next(
            m * 10.0**e
            for e in range(math.floor(math.log10(low)) - 6, math.ceil(math.log10(high)) + 1)
            for m in (1, 2, 5)
            if (high - low) / (m * 10.0**e) <= 6
        )
        ticks = [step * k for k in range(max(1, math.floor(low / step)), math.ceil(high / step) + 1)]
    return [float(f"{tick:.6g}") for tick in ticks]


def log_axis(values: Sequence[float], title: str) -> dict[str, Any]:
    """A logarithmic axis over all values, with round ticks; those that are not positive are not shown."""
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


def shade(i: int, count: int) -> str:
    """The colour of the i-th of ordered things, such as widths: from dark to light, for colour-blind people too."""
    place = 0.9 * i / max(1, count - 1)  # the end of the scale is a yellow, weak on white
    return str(sample_colorscale("Viridis", [place])[0])


def short(number: float) -> str:
    """50000 -> 50k."""
    for size, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{suffix}"
    return f"{number:g}"
