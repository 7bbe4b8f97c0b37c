"""The sections of the report, each made from the records of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from msn_dist.training.figures import Chart, Format, Line, bar_chart, count, line_chart, percent, plain
from msn_dist.units import binary

Record = dict[str, Any]

QUALITY = {
    "auc": "AUC",
    "gauc": "GAUC",
    "qauc": "QAUC",
    "logloss": "logloss",
    "ne": "NE",
    "calibration": "calibration",
}

# key -> title, how to read it, format, bottom of the axis, value that its top reaches at least
_HEALTH: dict[str, tuple[str, str, Format, float, float]] = {
    "used_share": (
        "Slots ever used",
        "Share of all slots hit at least once since the start. A plateau far below 100% is dead memory.",
        percent,
        *(0, 1.04),
    ),
    "window_used_share": (
        "Slots used lately",
        "Share of slots hit since the point before. Falling while the loss still moves means that queries collapse.",
        percent,
        *(0, 1.04),
    ),
    "entropy_ratio": (
        "Evenness of use",
        "Entropy of the hits over that of uniform use: 1 is perfectly even, 0 is a single slot.",
        plain,
        *(0, 1.04),
    ),
    "kl_to_uniform": (
        "Distance from uniform use",
        "KL divergence in nats: 0 is uniform, and ln 10 = 2.3 is like using a tenth of the slots.",
        plain,
        *(0, 1),
    ),
    "top1pct_share": (
        "Hits on the hottest 1% of slots",
        "1% if use is even. Real traffic is skewed; a steady climb towards 100% is collapse.",
        percent,
        *(0, 0.1),
    ),
    "owner_load_max_over_mean": (
        "Busiest owner over the mean",
        "Hits on the busiest rank over the mean: 1 is perfect balance, at 2 every rank waits twice as long.",
        plain,
        *(1, 1.2),
    ),
}


@dataclass(frozen=True)
class Grid:
    """A table; the first column holds names, the others numbers. `told`: the last one is prose, and it is wide."""

    header: list[str]
    rows: list[list[str]]
    told: bool = False


@dataclass(frozen=True)
class Card:
    """A section of the page. `empty` says why there is nothing to show, where there is nothing."""

    title: str
    empty: str
    charts: list[Chart] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    story: str = ""


def quality(evaluations: Sequence[Record], last: Record) -> Card:
    """Curves of the first task on valid, and a table of all tasks and splits."""
    records = [record for record in evaluations if record["split"] == "valid"]
    charts = []
    if records:
        task = next(iter(records[0]["metrics"]))
        steps = [record["step"] for record in records]
        curve = {name: [record["metrics"][task].get(name) for record in records] for name in QUALITY}
        charts = [
            line_chart(
                f"Validation ranking quality, {task}",
                "Higher is better. AUC ranks all rows together; GAUC and QAUC rank within each group.",
                [Line(QUALITY[name], steps, curve[name]) for name in ("auc", "gauc", "qauc")],
                format_last=fixed,
            ),
            line_chart(
                f"Validation logloss, {task}",
                "Lower is better, in nats. A rise while the training loss still falls is over-fitting.",
                [Line("logloss", steps, curve["logloss"])],
                format_last=fixed,
            ),
        ]
    rows = []
    for split in ("valid", "test"):
        for task, metrics in (last.get(split, {}).get("tasks") or {"": last.get(split)}).items():
            if metrics:
                rows.append([f"{split} {task}".strip(), *(fixed(metrics.get(name)) for name in QUALITY)])
    grids = [Grid(["", *QUALITY.values()], rows)] if rows else []
    return Card("Ranking quality", "No evaluation has been recorded yet.", charts, grids)


def training(train: Sequence[Record]) -> Card:
    """Loss and learning rate."""
    charts = []
    if train:
        charts = [
            line_chart(
                "Training loss",
                "Mean over each logging interval. It should fall fast, then slowly.",
                [_curve(train, "loss")],
                format_last=fixed,
            ),
            line_chart(
                "Learning rate",
                "Of the dense parameters: warm-up first, then the schedule.",
                [_curve(train, "learning_rate")],
                format_y=_tiny,
                bottom=0,
            ),
        ]
    return Card("Training", "No training step has been recorded yet.", charts)


def health(train: Sequence[Record]) -> Card:
    """How evenly each layer's slots were used, over the steps."""
    records = [record for record in train if record.get("memory")]
    charts = []
    for key, (title, how, format_y, bottom, top) in _HEALTH.items() if records else ():
        lines = []
        for layer in records[0]["memory"]:
            values = [record["memory"].get(layer, {}).get(key) for record in records]
            lines.append(Line(layer, [record["step"] for record in records], values))
        charts.append(line_chart(title, how, lines, format_y=format_y, bottom=bottom, top_at_least=top))
    return Card("Memory health over time", "No memory statistics have been recorded yet.", charts)


def usage(usage: dict[str, Record] | None) -> Card:
    """Hits on slots and owners in the last interval of a run."""
    title = "How the slots were used"
    if not usage:
        return Card(title, "Counted at the end of a run; this one has not come to it.")
    charts = [
        bar_chart(
            f"Hits per slot, {layer}",
            "How many slots took how many hits in the last interval. A bar is named by its least hits; 0 is idle.",
            [count(edge) for edge in part["hits_histogram"]["bin_edges"][:-1]],
            {layer: part["hits_histogram"]["slots"]},
            x_label="hits",
            first_color=number,
        )
        for number, (layer, part) in enumerate(usage.items())
    ]
    curves = {layer: part["rank_curve"] for layer, part in usage.items()}
    charts.append(
        line_chart(
            "Share of hits taken by the hottest slots",
            "Slots sorted from hot to cold. The dashed line is even use; the closer a curve to it, the better.",
            [Line(layer, curve["share_of_slots"], curve["share_of_hits"]) for layer, curve in curves.items()],
            x_label="share of slots",
            format_x=percent,
            format_y=percent,
            format_last=lambda _: "",  # all slots always take all hits
            bottom=0,
            top_at_least=1.04,
            diagonal=True,
        )
    )
    owners = {layer: part["hits_per_owner"] for layer, part in usage.items()}
    world_size = len(next(iter(owners.values())))
    if world_size > 1:
        charts.append(
            bar_chart(
                "Load of each owner",
                "Hits on the slots of each rank over the mean; the dashed line is perfect balance.",
                [str(rank) for rank in range(world_size)],
                {layer: [hit * world_size / max(sum(hits), 1) for hit in hits] for layer, hits in owners.items()},
                x_label="rank",
                format_y=plain,
                reference=1,
            )
        )
    return Card(title, "", charts)


def speed(train: Sequence[Record], last: Record) -> Card:
    """Throughput and bytes sent."""
    charts, grids = [], []
    if train:
        charts.append(
            line_chart(
                "Throughput",
                "Rows per second over all ranks. Dips are a slow reader or a busy machine.",
                [_curve(train, "examples_per_second")],
                format_y=count,
                bottom=0,
            )
        )
    if any("exchange" in record for record in train):
        hidden = [record.get("exchange", {}).get("hidden_share") for record in train]
        charts.append(
            line_chart(
                "Exchange hidden behind computing",
                "Of the time that the memory's messages are under way, the share that nobody waits for.",
                [Line("last", [record["step"] for record in train], hidden)],
                format_y=percent,
                bottom=0,
            )
        )
    if sent := [
        (f"{direction}: {name.replace('_', ' ')}", size)
        for direction, messages in last.get("bytes_sent", {}).items()
        for name, size in messages.items()
    ]:
        total = sum(size for _, size in sent)
        rows = [[name, binary(size), percent(size / total)] for name, size in sent]
        grids.append(Grid(["memory traffic between ranks", "whole run", "share"], rows))
    elif last.get("world_size") == 1:
        grids.append(Grid(["memory traffic between ranks"], [["none: one rank holds the whole model"]]))
    return Card("Speed and traffic", "No training step has been recorded yet.", charts, grids)


def _curve(records: Sequence[Record], key: str) -> Line:
    return Line("last", [record["step"] for record in records], [record.get(key) for record in records])


def fixed(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _tiny(value: float) -> str:
    return f"{value:.1e}" if value else "0"
