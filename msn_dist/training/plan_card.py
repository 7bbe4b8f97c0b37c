"""The section of the report on the plan that a run was started with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from msn_dist.training.cards import Card, Grid, Record
from msn_dist.training.figures import SERIES_COLORS, Chart, Line, lane_chart, scaling_chart, stack_chart, three
from msn_dist.units import binary

if TYPE_CHECKING:
    from msn_dist.planner.plan_file import PlanFile

_RANKS = 16  # bars
_SMALL = 0.01  # of a whole: too thin to be seen
_WORSE = 4  # times the longest step of the first curve: no contest
_IN_VIEW = 1.5  # a capacity of so many times the highest bar is drawn


def plan_card(plan: PlanFile, forecast: Record) -> Card:
    """What was planned; `forecast`, of the summary, has what was measured, and is empty before the end of a run."""
    charts = [_memory(plan)]
    if any(len(curve) > 1 for curve in plan.seconds_over_ranks.values()):
        charts.append(_over_ranks(plan))
    charts.append(_time(plan, forecast.get("seconds_measured")))
    grids = [_compared(plan, forecast)]
    if plan.rivals:
        grids.append(_rivals(plan))
    return Card("Plan", "", charts, grids, _story(plan))


def _story(plan: PlanFile) -> str:
    nodes = plan.world_size // plan.ranks_per_node
    ranks = f"{plan.world_size:,} rank{'s' * (plan.world_size > 1)} ({nodes} x {plan.ranks_per_node})"
    made = f"Made for {plan.topology}: {ranks} of {plan.machine}"
    if plan.memory is None:
        return f"{made}; {plan.reason}."
    memory = plan.memory
    chosen = f"{memory.layout}, values {memory.values}, wire {memory.wire}"
    return f"{made}. Chosen: {chosen}, because {plan.reason}."


def _memory(plan: PlanFile) -> Chart:
    fullest = int(np.argmax(plan.bytes_W))
    ranks = _shown(plan.world_size, fullest)
    unit, size = ("GiB", 2**30) if plan.bytes_W[fullest] >= 2**30 else ("MiB", 2**20)
    parts = _merged({kind: np.array(bytes_W) / size for kind, bytes_W in plan.storage.items()})
    near = plan.capacity <= _IN_VIEW * plan.bytes_W[fullest]
    how = f"Rank {fullest:,}, the fullest, takes {binary(plan.bytes_W[fullest])} of the {binary(plan.capacity)} "
    how += "that it may fill, the dashed line. " if near else "that it may fill. "
    return stack_chart(
        f"Memory of {'each rank' if len(ranks) == plan.world_size else f'{len(ranks)} of the ranks'}, {unit}",
        f"{how}The legend has its parts.",
        [str(rank) for rank in ranks],
        {kind: part_W[ranks] for kind, part_W in parts.items()},
        [three(part_W[fullest]) for part_W in parts.values()],
        x_label="rank",
        reference=plan.capacity / size if near else None,
    )


def _time(plan: PlanFile, measured: float | None) -> Chart:
    """The first lane adds up to a step."""
    parts = _merged({p.name: 1e3 * np.array([p.seconds - p.hidden, p.hidden]) for p in plan.phases})
    hidden = any(phase.hidden for phase in plan.phases)
    lanes = ["step", "hidden"] if hidden else ["step"]
    how = f"The phases of a step, {_ms(plan.seconds)} in all."
    if hidden:
        how += " What is pale runs beside them and costs nothing."
    if measured is not None:
        how += f" The dashed line is a step as measured, {_ms(measured)}."
    return lane_chart(
        "Time of a step, ms",
        how,
        lanes,
        {name: ms[: len(lanes)] for name, ms in parts.items()},
        [three(exposed) + (f" + {three(beside)} hidden" if beside else "") for exposed, beside in parts.values()],
        x_label="ms",
        reference=None if measured is None else 1e3 * measured,
    )


def _over_ranks(plan: PlanFile) -> Chart:
    """The chosen strategy comes first, and so has the first colour."""
    chosen = plan.memory.strategy if plan.memory is not None else None
    curves = sorted(plan.seconds_over_ranks.items(), key=lambda item: item[0] != chosen)
    lines = [
        Line(strategy, [ranks for ranks, _ in points], [1e3 * seconds for _, seconds in points])
        for strategy, points in curves
        if points
    ]
    top = _WORSE * max(lines[0].y)
    how = f"As many rows a rank as planned; logarithmic. The dashed line and the legend: {plan.world_size:,} ranks."
    if any(max(line.y) > top for line in lines):
        how += f" What leaves the picture takes over {_WORSE} times as long."
    return scaling_chart("Step time over ranks, ms", how, lines, x_label="ranks", here=plan.world_size, top=top)


def _compared(plan: PlanFile, forecast: Record) -> Grid:
    """Of rank 0, which writes the summary."""
    quantities = [
        ("time of a step", plan.seconds, forecast.get("seconds_measured"), _ms),
        ("tensors of rank 0, at most", plan.allocated_W[0], forecast.get("bytes_measured"), binary),
    ]
    return Grid(
        ["", "planned", "measured", "plan off by"],
        [
            [name, show(said), *(("-", "-") if took is None else (show(took), f"{said / took - 1:+.1%}"))]
            for name, said, took, show in quantities
        ],
    )


def _rivals(plan: PlanFile) -> Grid:
    """Below the plan itself."""
    rows = [(plan.memory, plan.seconds, max(plan.bytes_W), "chosen")]
    rows += [(rival.memory, rival.seconds, rival.bytes, rival.why) for rival in plan.rivals]
    return Grid(
        ["layout", "values", "wire", "a step", "fullest rank", ""],
        [
            [memory.layout, memory.values, memory.wire, _ms(seconds), binary(size), why]
            for memory, seconds, size, why in rows
        ],
        told=True,
    )


def _ms(seconds: float) -> str:
    return f"{three(1e3 * seconds)} ms"


def _shown(world: int, fullest: int) -> list[int]:
    """At most 16 ranks, evenly chosen, the fullest instead of the nearest of them."""
    if world <= _RANKS:
        return list(range(world))
    ranks = np.linspace(0, world - 1, _RANKS).round().astype(int)
    ranks[np.abs(ranks - fullest).argmin()] = fullest
    return ranks.tolist()


def _merged(parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those that can be seen, at most as many as there are colours, and the others as "rest"; nothing of zeros."""
    parts = {name: part for name, part in parts.items() if part.any()}
    seen = _SMALL * sum(parts.values(), np.zeros(1)).max()
    largest = sorted(parts, key=lambda name: -parts[name].max())[: SERIES_COLORS - 1]
    small = [name for name in parts if name not in largest or parts[name].max() < seen]
    if len(small) > 1:
        rest = sum(parts[name] for name in small)
        parts = {name: part for name, part in parts.items() if name not in small} | {"rest": rest}
    return parts
