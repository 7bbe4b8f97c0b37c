"""python -m benchmarks.exchange_plot: results/exchange.svg from results/exchange.csv, which benchmarks.exchange writes.

Above, time of a step over W for every skew; below, bytes that a rank sends with uniform slots: as expected
(msn_dist.planner.load) up to W = 4,096, and as counted.  L = 32, D = 64, fp32.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.exchange_model import WORLDS
from benchmarks.exchange_slots import SLOTS
from benchmarks.results import FOLDER
from msn_dist.planner.layout import Layout
from msn_dist.planner.load import Load
from msn_dist.planner.simulate import simulate

HITS, DIM = 32, 64
# colours that the colour-blind can tell apart, and markers for everybody else
LOOKS = {
    "row_pooled": ("#0072B2", "o", "-"),
    "row_pooled_sparse": ("#56B4E9", "s", "-"),
    "row_gather": ("#D55E00", "^", "-"),
    "row_gather_unique": ("#E69F00", "v", "-"),
    "two_level": ("#009E73", "D", "--"),
    "column": ("#CC79A7", "P", "-"),
    "replicated": ("#555555", "X", "-"),
}
_STYLE = {"font.size": 10, "svg.hashsalt": "exchange", "axes.spines.top": False, "axes.spines.right": False}

Row = dict[str, str]


def draw(path: Path) -> Path:
    """The plot of a CSV, beside it."""
    with open(path, newline="") as file:
        rows = [r for r in csv.DictReader(file) if (r["hits"], r["dim"], r["wire"]) == (str(HITS), str(DIM), "fp32")]
    steps = [r for r in rows if r["benchmark"] == "step"]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 7.6), facecolor="white", layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=(1, 1.15))
        axes = above.subplots(1, len(SLOTS), sharey=True)
        for axis, skew in zip(axes, SLOTS, strict=True):
            _times(axis, [r for r in steps if r["skew"] == skew and r["metric"] == "time"])
            axis.set_title(f"{skew}, n = {SLOTS[skew]:,}", fontsize=10, loc="left")
        axes[0].set_ylabel("ms a step (p20, p50, p80)")
        left, right = below.subplots(1, 2, width_ratios=(2, 1))
        _bytes(left, [r for r in steps if r["skew"] == "uniform" and r["unit"] == "bytes"])
        _legend(right, axes[0], steps[0]["cores"])
        target = path.with_suffix(".svg")
        figure.savefig(target, metadata={"Date": None})
    return target


def _times(axis: Axes, rows: Sequence[Row]) -> None:
    for strategy, (colour, marker, line) in LOOKS.items():
        mine = [r for r in rows if r["strategy"] == strategy]
        points = sorted((int(r["ranks"]), float(r["p20"]), float(r["p50"]), float(r["p80"])) for r in mine)
        worlds, low, middle, high = zip(*points, strict=True)
        axis.plot(worlds, middle, line, color=colour, marker=marker, markersize=5, label=strategy)
        axis.fill_between(worlds, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _worlds(axis, sorted({int(r["ranks"]) for r in rows}))


def _bytes(axis: Axes, rows: Sequence[Row]) -> None:
    load = Load.uniform(SLOTS["uniform"], int(rows[0]["bags"]), HITS)
    for strategy, (colour, marker, line) in LOOKS.items():
        worlds = [world for world in WORLDS if strategy != "column" or world <= DIM]  # a column a rank at least
        expected = [simulate(Layout(world, 1, strategy), load, DIM).bytes_sent for world in worlds]
        axis.plot(worlds, expected, line, color=colour, linewidth=1.4)
        counted: dict[int, float] = {}
        for r in (r for r in rows if r["strategy"] == strategy):
            counted[int(r["ranks"])] = counted.get(int(r["ranks"]), 0) + float(r["p50"])
        axis.plot(counted.keys(), counted.values(), marker, color=colour, markersize=5)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:,g}"))
    axis.set_ylabel("MB that a rank sends in a step")
    axis.set_title("uniform: expected (lines) and counted (markers)", fontsize=10, loc="left")
    _worlds(axis, [world for world in WORLDS if world.bit_length() % 2 == 0 or world <= 8])


def _worlds(axis: Axes, worlds: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(worlds, [f"{world:,}" for world in worlds])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("W")
    axis.grid(alpha=0.25)


def _legend(axis: Axes, drawn: Axes, cores: str) -> None:
    axis.axis("off")
    axis.legend(*drawn.get_legend_handles_labels(), loc="upper left", frameon=False, title="strategy", alignment="left")
    notes = (
        f"L = {HITS}, D = {DIM}, fp32; 32,768 hits a rank.\n"
        f"All ranks share {cores} cores, so times beyond\nW = {cores} show work and not speed-up.\n"
        "two_level sends as many bytes as\nrow_pooled, fewer of them between nodes;\n"
        f"column needs W <= D = {DIM}."
    )
    axis.text(0.02, 0.02, notes, transform=axis.transAxes, fontsize=9, va="bottom")


if __name__ == "__main__":
    print(draw(FOLDER / "exchange.csv"))
