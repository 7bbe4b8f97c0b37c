"""python -m benchmarks.crossover: the strategy that the planner expects to be the fastest, over W, L and n.

Nodes of 8 H200 as in configs/topology/h200x8x8.yaml, as many as W asks for; 16,384 bags a rank, D = 64, values and wire
in bf16.  The time is that of the exchange of one memory, look-up and update included, forward and backward, with the
built-in profile (msn_dist.planner.cost); slots are hit uniformly, or by Zipf's law of exponent 1.05 on both axes.
A strategy whose table does not fit a rank is left out.

Writes benchmarks/results/crossover.csv, a line a cell with the milliseconds of every strategy, and crossover.svg.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.exchange_plot import LOOKS
from benchmarks.results import write_rows
from msn_dist.config import DataConfig, MemoryConfig, RankMixerConfig, RunConfig
from msn_dist.data.schema import Schema
from msn_dist.errors import InputError
from msn_dist.planner.cost import ModelTime, step_time
from msn_dist.planner.layout import Layout
from msn_dist.planner.machine import load_machine
from msn_dist.planner.search import in_best_groups
from msn_dist.planner.simulate import simulate
from msn_dist.planner.situation import Popularity, Situation
from msn_dist.planner.topology import load_topology

NODE = load_topology(Path(__file__).parents[1] / "configs" / "topology" / "h200x8x8.yaml")
WORLDS = [2**power for power in range(3, 13)]
SKEWS = {"uniform": Popularity(), "zipf 1.05": Popularity(zipf=1.05)}
ROWS, TOKENS, DIM = 2048, 8, 64  # rows of a rank
BY_HITS = [(2**30, hits) for hits in (8, 16, 32, 64, 128)]  # (n, L)
BY_SLOTS = [(4**power, 32) for power in range(8, 19)]
NO_ROOM = "does not fit"
_STYLE = {"font.size": 10, "figure.titlesize": 11, "svg.hashsalt": "crossover", "svg.fonttype": "none"}

Row = dict[str, Any]


def main() -> None:
    rows = [cell(skew, *shape, world) for skew in SKEWS for shape, world in product(shapes(), WORLDS)]
    with contextlib.redirect_stdout(None):  # the figure says the same
        path = write_rows("crossover.csv", rows)
    print(f"written to {path} and {draw(rows, path.with_suffix('.svg'))}")


def shapes() -> list[tuple[int, int]]:
    """(n, L) of all panels."""
    return list(dict.fromkeys((*BY_HITS, *BY_SLOTS)))


def cell(skew: str, slots: int, hits: int, world: int) -> Row:
    """Milliseconds of every strategy that can serve, and the best of them."""
    situation = _situation(SKEWS[skew], slots, hits, world)
    nothing = ModelTime(dense=0.0, memory=0.0, optimizer=0.0, parameter_bytes=0)
    layouts, ms = {}, {}
    for strategy in LOOKS:
        layout = layouts[strategy] = in_best_groups(situation, situation.layout(strategy, "bf16", "bf16"), nothing)
        if _table_bytes(layout, slots) > NODE.device_bytes:
            continue
        with contextlib.suppress(InputError):  # fewer columns or rows than ranks
            ms[strategy] = 1e3 * step_time(situation, layout, nothing, id_seconds=0.0).exchange
    best, next_best = (*sorted(ms, key=ms.get), NO_ROOM, NO_ROOM)[:2]
    found = {"skew": skew, "n": slots, "hits": hits, "ranks": world, "fastest": best, "next": next_best}
    if ms:
        step = simulate(layouts[best], situation.load, DIM)
        found |= {"mb_sent": step.bytes_sent / 1e6, "mb_between": step.bytes_between / 1e6}
    else:
        found |= {"mb_sent": "", "mb_between": ""}
    found["owner_load"] = situation.load.owner_load(world)
    return found | {f"{name}_ms": ms.get(name, "") for name in LOOKS} | {"profile": situation.machine.name}


def _situation(popularity: Popularity, slots: int, hits: int, world: int) -> Situation:
    config = RunConfig(
        name="crossover",
        data=DataConfig(path="nowhere", batch_size=ROWS * world),
        model=RankMixerConfig(tokens=TOKENS, width=DIM, layers=1),
        memory=MemoryConfig(sub_keys=math.isqrt(slots), top_k=hits),
    )
    schema = Schema(name="no columns that matter", tables={"id": 1}, ids={"id": "id"}, labels=["y"], group="id")
    topology = NODE.model_copy(update={"nodes": world // NODE.ranks_per_node})
    return Situation(config, schema, topology, load_machine(NODE.machine), popularity)


def _table_bytes(layout: Layout, slots: int) -> float:
    """Values in bf16, Adagrad's state (4 a row), use (5 a row) and, of replicas, the gradient in fp32."""
    match layout.strategy:
        case "replicated":
            return slots * (6 * DIM + 5 + 4 / layout.world)
        case "column":
            return slots * (2 * -(-DIM // layout.world) + 4 + 5 / layout.world)
    return slots / layout.world * (2 * DIM + 9)


def draw(rows: Sequence[Row], target: Path) -> Path:
    """W to the right, L (above) or n (below) upwards; a cell has the colour and the time of the fastest."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 7.6), facecolor="white", layout="constrained")
        axes = figure.subplots(2, len(SKEWS), sharex=True, height_ratios=(len(BY_HITS), len(BY_SLOTS)))
        for (place, panel), (column, skew) in product(enumerate((BY_HITS, BY_SLOTS)), enumerate(SKEWS)):
            axis = axes[place, column]
            _map(axis, [[_find(rows, skew, *shape, world) for world in WORLDS] for shape in panel])
            axis.set_yticks([y + 0.5 for y in range(len(panel))], list(_labels(panel)))
            axis.set_title(f"{skew}, " + ("n = 2^30" if panel is BY_HITS else "L = 32"), fontsize=10, loc="left")
        for axis in axes[1]:
            axis.set_xticks([x + 0.5 for x in range(len(WORLDS))], [f"{world:,}" for world in WORLDS], fontsize=8)
            axis.set_xlabel("W, 8 ranks a node")
        axes[0, 0].set_ylabel("L")
        axes[1, 0].set_ylabel("n")
        seen = [name for name in LOOKS if any(row["fastest"] == name for row in rows)]
        patches = [Patch(color=LOOKS[name][0], label=name) for name in seen]
        patches.append(Patch(facecolor="white", edgecolor="#999999", label=NO_ROOM))
        figure.legend(handles=patches, loc="outside lower center", ncols=-(-len(patches) // 2), frameon=False)
        figure.suptitle("Fastest exchange on nodes of 8 H200, expected ms a step (16,384 bags a rank, D = 64, bf16)")
        figure.savefig(target, metadata={"Date": None})
    return target


def _map(axis: Axes, cells: Sequence[Sequence[Row]]) -> None:
    names = [*LOOKS, NO_ROOM]
    colours = ListedColormap([*(look[0] for look in LOOKS.values()), "#ffffff"])
    codes = [[names.index(row["fastest"]) for row in line] for line in cells]
    axis.pcolormesh(codes, cmap=colours, vmin=-0.5, vmax=len(names) - 0.5, edgecolors="white", linewidth=0.5)
    for y, x in product(range(len(cells)), range(len(WORLDS))):
        row = cells[y][x]
        if row["fastest"] != NO_ROOM:
            ms = row[f"{row['fastest']}_ms"]
            ink = "white" if row["fastest"] == "replicated" else "black"  # on the one dark colour
            axis.text(x + 0.5, y + 0.5, f"{ms:.3g}", ha="center", va="center", fontsize=7, color=ink)


def _labels(panel: Sequence[tuple[int, int]]) -> Iterator[str]:
    for slots, hits in panel:
        yield str(hits) if panel is BY_HITS else f"2^{slots.bit_length() - 1}"


def _find(rows: Sequence[Row], skew: str, slots: int, hits: int, world: int) -> Row:
    return next(r for r in rows if (r["skew"], r["n"], r["hits"], r["ranks"]) == (skew, slots, hits, world))


if __name__ == "__main__":
    main()
