"""Charts of the report: small SVG texts whose colours are variables of the page they are put into."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

SERIES_COLORS = 10  # --series-0 ... --series-9
_INK, _GRID = "#0a0010", "#0a0011"  # stand-ins that `_render` replaces with var(--...)
_SIZE = (400, 216)  # units of the view box; a column of the page is as wide, so text keeps its size
_MAX_POINTS = 400
_DASHES = (0, (3, 3))
_STYLE = {
    "font.size": 11.5,
    "svg.fonttype": "none",  # text stays text, in the font of the page
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.edgecolor": _GRID,
    "grid.color": _GRID,
}

Format = Callable[[float], str]


@dataclass(frozen=True)
class Line:
    """One curve; None stands for a value that was not finite and leaves a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]


@dataclass(frozen=True)
class Chart:
    """A figure with its title, a sentence or two on how to read it and a legend of (label, value, color variable)."""

    title: str
    how: str
    svg: str
    legend: list[tuple[str, str, str]]


def count(value: float) -> str:
    """1234 -> 1.23k, in three significant digits."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def percent(value: float) -> str:
    return f"{value:.1%}".replace(".0%", "%")


def plain(value: float) -> str:
    return f"{value:.4g}"


def three(value: float) -> str:
    """Three significant digits, or all before the point: 0.0213, 12.3, 1,235."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def line_chart(
    title: str,
    how: str,
    lines: Sequence[Line],
    *,
    x_label: str = "step",
    format_x: Format = count,
    format_y: Format = plain,
    format_last: Format | None = None,
    bottom: float | None = None,
    top_at_least: float = -math.inf,
    diagonal: bool = False,
) -> Chart:
    """Curves over one axis; a curve of few points shows each of them."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _canvas(format_y)
        legend = []
        for number, line in enumerate(lines):
            x, y = _thin(line)
            marker = "o" if len(x) <= 24 else None
            axes.plot(x, y, color=_series(number), linewidth=1.8, marker=marker, markersize=3.5)
            last = next((value for value in reversed(line.y) if value is not None), math.nan)
            legend.append((line.label, "-" if math.isnan(last) else (format_last or format_y)(last), _variable(number)))
        if diagonal:
            axes.plot([0, 1], [0, 1], color=_INK, linewidth=1, linestyle=_DASHES, zorder=1)
        end = max((max(line.x) for line in lines), default=0) or 1
        axes.set_xlim(-0.01 * end, 1.02 * end)
        low, high = axes.get_ylim()
        if bottom is not None:  # a level curve would lie on the upper edge
            low, high = bottom, bottom + 1.05 * (high - bottom)
        axes.set_ylim(low, max(high, top_at_least))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=format_x is count, min_n_ticks=1))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_x(value)))
        axes.set_xlabel(x_label)
        return Chart(title, how, _render(figure, title), legend)


def bar_chart(
    title: str,
    how: str,
    names: Sequence[str],
    bars: dict[str, Sequence[float]],
    *,
    x_label: str,
    format_y: Format = count,
    reference: float | None = None,
    first_color: int = 0,
) -> Chart:
    """Groups of bars, one bar of each label in a group, over the names of the groups."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _canvas(format_y)
        width = 0.8 / len(bars)
        places = np.arange(len(names))
        for number, heights in enumerate(bars.values()):
            axes.bar(places - 0.4 + (number + 0.5) * width, heights, width * 0.92, color=_series(first_color + number))
        if reference is not None:
            axes.axhline(reference, color=_INK, linewidth=1, linestyle=_DASHES)
        stride = math.ceil(len(names) / 10)
        axes.set_xticks(places[::stride], names[::stride])
        axes.set_xlabel(x_label)
        legend = [(label, "", _variable(number)) for number, label in enumerate(bars, first_color)]
        return Chart(title, how, _render(figure, title), legend)


def stack_chart(
    title: str,
    how: str,
    names: Sequence[str],
    parts: dict[str, Sequence[float]],
    values: Sequence[str],
    *,
    x_label: str,
    reference: float | None = None,
) -> Chart:
    """A bar over each name, of parts; `values` stand in the legend."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _canvas(plain)
        places, bottom = np.arange(len(names)), np.zeros(len(names))
        for number, heights in enumerate(parts.values()):
            axes.bar(places, heights, 0.74, bottom, color=_series(number))
            bottom += heights
        if reference is not None:
            axes.axhline(reference, color=_INK, linewidth=1, linestyle=_DASHES)
        middle, half = (len(names) - 1) / 2, max(len(names), 5) / 2 + 0.1
        axes.set_xlim(middle - half, middle + half)
        stride = math.ceil(len(names) * max(map(len, names)) / 50)  # so many figures stand in a line
        axes.set_xticks(places[::stride], names[::stride])
        axes.set_xlabel(x_label)
        return Chart(title, how, _render(figure, title), _legend(parts, values))


def lane_chart(
    title: str,
    how: str,
    lanes: Sequence[str],
    parts: dict[str, Sequence[float]],
    values: Sequence[str],
    *,
    x_label: str,
    reference: float | None = None,
) -> Chart:
    """Lying bars of parts, from top to bottom; those after the first are pale.  A single one needs no name."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _canvas(plain, height=56 + 36 * len(lanes), across=True)
        left = np.zeros(len(lanes))
        for number, widths in enumerate(parts.values()):
            for lane, width in enumerate(widths):
                axes.barh(lane, width, 0.7, left[lane], color=_series(number), alpha=0.5 if lane else None)
            left += widths
        if reference is not None:
            axes.axvline(reference, color=_INK, linewidth=1.5, linestyle=_DASHES)
        axes.set_ylim(len(lanes) - 0.5, -0.5)
        axes.set_yticks(range(len(lanes)), lanes if len(lanes) > 1 else [""])
        axes.set_xlabel(x_label)
        return Chart(title, how, _render(figure, title), _legend(parts, values))


def scaling_chart(title: str, how: str, lines: Sequence[Line], *, x_label: str, here: float, top: float) -> Chart:
    """Curves over powers of two up to `top`, logarithmic; the legend has their values at the dashed line, `here`."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _canvas(plain, log=True)
        for number, line in enumerate(lines):
            axes.plot(line.x, line.y, color=_series(number), linewidth=1.8, marker="o", markersize=3.5)
        axes.axvline(here, color=_INK, linewidth=1, linestyle=_DASHES, zorder=1)
        low, high = axes.get_ylim()
        axes.set_ylim(low, min(high, top))
        axes.xaxis.set_major_locator(LogLocator(2, numticks=10))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        if min(high, top) > 10 * low:
            axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
        axes.set_xlabel(x_label)
        at_W = [dict(zip(line.x, line.y, strict=True)) for line in lines]
        values = [three(y_W[here]) if here in y_W else "-" for y_W in at_W]
        return Chart(title, how, _render(figure, title), _legend([line.label for line in lines], values))


def _canvas(
    format_value: Format, height: float = _SIZE[1], across: bool = False, log: bool = False
) -> tuple[Figure, Axes]:
    """Values go up, or `across`; `log`: both axes, x by powers of two."""
    figure = Figure(figsize=(_SIZE[0] / 72, height / 72), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.tick_params(length=0, pad=6)
    axes.grid(axis="x" if across else "y", linewidth=1)
    axes.set_axisbelow(True)
    if log:  # before the locators, which it sets as well
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    axis = axes.xaxis if across else axes.yaxis
    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_value(value)))
    return figure, axes


def _legend(labels: Iterable[str], values: Iterable[str]) -> list[tuple[str, str, str]]:
    pairs = zip(labels, values, strict=True)
    return [(label, value, _variable(number)) for number, (label, value) in enumerate(pairs)]


def _thin(line: Line) -> tuple[np.ndarray, np.ndarray]:
    """At most _MAX_POINTS points: the first, the last, and between them means of neighbours, which keep a gap where one
    of them is not finite."""
    x, y = np.asarray(line.x, dtype=float), np.asarray(line.y, dtype=float)
    if len(x) <= _MAX_POINTS:
        return x, y
    starts = np.linspace(1, len(x) - 1, _MAX_POINTS - 2, endpoint=False).astype(int)
    sizes = np.diff([*starts, len(x) - 1])
    return tuple(np.concatenate([z[:1], np.add.reduceat(z[:-1], starts) / sizes, z[-1:]]) for z in (x, y))


def _series(number: int) -> str:
    return f"#0a000{number % SERIES_COLORS}"


def _variable(number: int) -> str:
    return f"--series-{number % SERIES_COLORS}"


def _render(figure: Figure, title: str) -> str:
    """The figure as an <svg> element: no ids shared with another one, no size, colours as variables."""
    file = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 role="img" aria-hidden="true">', svg, count=1)
    svg = re.sub(r' id="(?:figure|axes|patch|line2d|text|matplotlib|xtick|ytick)[^"]*"', "", svg)
    svg = re.sub(r"<style.*?</style>|font: [^;]*; ", "", svg)  # the page sets the font
    svg = svg.replace("xlink:href", "href").replace(_INK, "var(--muted)").replace(_GRID, "var(--line)")
    return re.sub(r"#0a000([0-9])\b", r"var(--series-\1)", svg)
