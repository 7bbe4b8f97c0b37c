"""python -m benchmarks.kernel_plot: results/kernels.svg from results/kernels.csv, which benchmarks.kernels writes.

One panel a kernel and mode: time of every provider at every shape, p20 to p80 as whiskers.  Hollow markers are peers
with results in 16 bits.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.results import FOLDER

# colours that the colour-blind can tell apart, and markers for everybody else; by the name before any comma
LOOKS = {
    "msn_dist": ("#D55E00", "*"),
    "eager": ("#0072B2", "o"),
    "compile": ("#56B4E9", "s"),
    "airtopk": ("#009E73", "^"),
    "airtopk 8 bits": ("#009E73", "v"),
    "airtopk pairs": ("#009E73", "<"),
    "raft auto": ("#CC79A7", "D"),
    "TBE fp16": ("#E69F00", "P"),
    "TBE": ("#E69F00", "P"),
    "embedding_bag": ("#0072B2", "X"),
    "score products alone": ("#555555", "_"),
    "rows read once (floor)": ("#555555", "_"),
}
_OTHER = ("#000000", ".")
_NARROW = ("scores bf16", "output float16", "int32, output bf16")
_STYLE = {"font.size": 9, "svg.hashsalt": "kernels", "axes.spines.top": False, "axes.spines.right": False}

Row = dict[str, str]


def draw(path: Path) -> Path:
    """The plot of a CSV, beside it."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    times = [row for row in rows if row["metric"] == "time"]
    panels = list(dict.fromkeys((row["kernel"], row["mode"]) for row in times))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(12, 3.6 * max(1, len(panels)) + 0.8), facecolor="white", layout="constrained")
        axes = figure.subplots(max(1, len(panels)), 1, squeeze=False)[:, 0]
        for axis, (kernel, mode) in zip(axes, panels, strict=False):
            _panel(axis, [row for row in times if (row["kernel"], row["mode"]) == (kernel, mode)])
            axis.set_title(f"{kernel}, {mode}", fontsize=10, loc="left")
        figure.suptitle("Time of kernels and their peers: median, p20 to p80", x=0.01, ha="left", fontsize=12)
        figure.supxlabel(_conditions(rows), x=0.01, ha="left", fontsize=7)
        target = path.with_suffix(".svg")
        figure.savefig(target, metadata={"Date": None})
    return target


def _panel(axis: Axes, rows: Sequence[Row]) -> None:
    shapes = list(dict.fromkeys(_shape(row) for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    for place, provider in enumerate(providers):
        name, _, detail = provider.partition(", ")
        colour, marker = LOOKS.get(name, _OTHER)
        mine = [row for row in rows if row["provider"] == provider]
        low, middle, high = ([float(row[p]) for row in mine] for p in ("p20", "p50", "p80"))
        aside = 0.8 * ((place + 0.5) / len(providers) - 0.5)
        axis.errorbar(
            [shapes.index(_shape(row)) + aside for row in mine],
            middle,
            yerr=(_gaps(low, middle), _gaps(middle, high)),
            fmt=marker,
            color=colour,
            markerfacecolor="white" if detail in _NARROW else colour,
            markersize=6,
            elinewidth=1,
            label=provider,
        )
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylabel("ms")
    axis.set_xticks(range(len(shapes)), shapes, fontsize=6)
    axis.grid(axis="y", which="both", alpha=0.25)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=7)


def _gaps(below: Sequence[float], above: Sequence[float]) -> list[float]:
    return [high - low for low, high in zip(below, above, strict=True)]


def _shape(row: Row) -> str:
    """A tick's label, in few lines."""
    if row["queries"]:
        return f"M={int(row['queries']):,}\nN={int(row['sub_keys']):,}\nE={row['key_dim']}, k={row['k']}"
    table = f"{row['dtype']}\nD={row['dim']}\nn=2^{int(row['n']).bit_length() - 1}"
    return f"{table}\n{row['bags']}x{row['hits']}\n{row['slots']}"


def _conditions(rows: Sequence[Row]) -> str:
    one = rows[0]
    peaks = [f"{row['provider']} {float(row['p50']):,.0f} {row['unit']}" for row in rows if row["kernel"] == "machine"]
    versions = [f"{name} {one[name]}" for name in ("python", "torch", "triton", "fbgemm") if one.get(name)]
    return "   ".join([one["device"], *peaks, *versions, one["date"]])


if __name__ == "__main__":
    print(draw(FOLDER / "kernels.csv"))
