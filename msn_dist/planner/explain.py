"""A plan as people read it on a terminal, 80 columns wide."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from msn_dist.planner.machine import Collective, Curve, Dispatch, Latency, Machine
from msn_dist.planner.plan_file import PlanFile, Rival

WIDTH = 80
_GIB, _MIB = 2**30, 2**20


def explain(plan: PlanFile) -> RenderableType:
    """What was chosen, why, what it takes, and what came next."""
    fullest = max(range(plan.world_size), key=lambda rank: plan.bytes_W[rank])
    parts: list[RenderableType] = [_heading(plan), Text()]
    side_by_side = Table.grid(padding=(0, 3))
    side_by_side.add_row(_memory(plan, fullest), _time(plan))
    parts.append(side_by_side)
    if plan.rivals:
        parts += [Text(), _rivals(plan)]
        exact = [rival.memory for rival in plan.rivals if not rival.rounds]
        as_config = all((m.wire, m.value_dtype) == (plan.memory.wire, plan.memory.value_dtype) for m in exact)
        if as_config and any(rival.rounds for rival in plan.rivals):
            parts.append(Text("Other values, or another wire, round more than the config: --round allows it."))
    return Group(*parts)


def _heading(plan: PlanFile) -> Table:
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="bold")
    lines.add_column(max_width=WIDTH - 12, overflow="fold")
    nodes = plan.world_size // plan.ranks_per_node
    ranks = f"{plan.world_size} rank{'s' * (plan.world_size > 1)}"
    lines.add_row("plan", f"{plan.config} on {plan.topology}: {ranks}, {nodes} x {plan.ranks_per_node}, {plan.machine}")
    if plan.memory is not None:
        memory = plan.memory
        cached = f", {plan.settings['memory.cache']:.2g} cached" if memory.tier == "host" else ""
        lines.add_row("memory", f"{memory.layout}, values {memory.values}{cached}, wire {memory.wire}")
    lines.add_row("for", plan.demand)
    lines.add_row("because", plan.reason)
    return lines


def _memory(plan: PlanFile, rank: int) -> Table:
    table = Table(title=f"rank {rank}, the fullest", title_justify="left", box=None, pad_edge=False)
    unit, size = ("GiB", _GIB) if plan.bytes_W[rank] >= _GIB else ("MiB", _MIB)
    table.add_column("memory")
    table.add_column(unit, justify="right")
    table.add_column("mean", justify="right")
    _add_kinds(table, "", {kind: bytes_W for kind, bytes_W in plan.storage.items() if max(bytes_W)}, rank, size)
    table.add_row("may fill", _short(plan.capacity / size), "")
    if plan.host_storage:
        _add_kinds(table, "host: ", plan.host_storage, rank, size)
        table.add_row("host: may fill", _short(plan.host_capacity / size), "")
    return table


def _add_kinds(table: Table, prefix: str, storage: dict[str, list[int]], rank: int, size: int) -> None:
    """Of the rank and on average, in units of `size` bytes."""
    total_W = [sum(kinds) for kinds in zip(*storage.values(), strict=True)]
    for kind, bytes_W in (storage | {"total": total_W}).items():
        mean = sum(bytes_W) / len(bytes_W)
        style = "bold" if kind == "total" else None
        table.add_row(prefix + kind, _short(bytes_W[rank] / size), _short(mean / size), style=style)


def _time(plan: PlanFile) -> Table:
    table = Table(title="a step", title_justify="left", box=None, pad_edge=False)
    table.add_column("time")
    for name in ("ms", "hidden", "sent MiB"):
        table.add_column(name, justify="right")
    for phase in plan.phases:
        if phase.seconds:
            hidden = f"{1e3 * phase.hidden:.2f}" if phase.hidden else ""
            sent = f"{phase.sent / _MIB:.1f}" if phase.sent else ""
            table.add_row(phase.name, f"{1e3 * phase.seconds:.2f}", hidden, sent)
    sent = sum(phase.sent for phase in plan.phases)
    table.add_row("critical path", f"{1e3 * plan.seconds:.2f}", "", f"{sent / _MIB:.1f}" if sent else "", style="bold")
    if plan.memory is not None:
        table.add_row("busiest owner / mean", f"{plan.owner_load:.2f}", "", "")
    return table


def _rivals(plan: PlanFile) -> Table:
    """What they store and send is told of those that differ in it from the plan."""
    table = Table(title="not chosen", title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    unit, size = ("GiB", _GIB) if max(plan.bytes_W) >= _GIB else ("MiB", _MIB)
    differing = [name for name in ("values", "wire") if any(_other(rival, plan, name) for rival in plan.rivals)]
    for name in ("memory", *differing, "ms", unit, "step; most of it in (ms)"):
        table.add_column(name, justify="right" if name in ("ms", unit) else "left")
    for rival in sorted(plan.rivals, key=lambda rival: rival.rounds):
        tier = f" {rival.memory.tier} tier" if rival.memory.tier != plan.memory.tier else ""
        others = [_other(rival, plan, name) for name in differing]
        times = f"{1e3 * rival.seconds:.2f}", _short(rival.bytes / size)
        table.add_row(rival.memory.layout + tier, *others, *times, rival.why)
    return table


def _other(rival: Rival, plan: PlanFile, name: str) -> str:
    """Its dtype of `values` or `wire` where that is not the plan's."""
    field = {"values": "value_dtype", "wire": "wire"}[name]
    theirs = getattr(rival.memory, field)
    return "" if theirs == getattr(plan.memory, field) else theirs


def _short(number: float) -> str:
    return f"{number:,.2f}" if number < 100 else f"{number:,.0f}"


def explain_machine(machine: Machine) -> Table:
    """A profile: each rate, and the share of `straggling`, at the smallest and the largest size measured."""
    table = Table(title=f"{machine.name}, {machine.ranks} at once", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for name in ("from", "to", "source"):
        table.add_column(name, justify="right")
    for name in Machine.model_fields:
        value = getattr(machine, name)
        if isinstance(value, Curve):
            shown = "{:.1%}" if name == "straggling" else "{:.3g}/s"
            first, last = (shown.format(value.points[place][1]) for place in (0, -1))
            table.add_row(name, first, last, value.source)
        elif isinstance(value, Latency):
            table.add_row(name, f"{1e6 * value.seconds:.3g} us", "", value.source)
        elif isinstance(value, Dispatch):
            for part in ("operator", "memory", "step"):
                table.add_row(f"{name}: {part}", f"{1e6 * getattr(value, part):.3g} us", "", value.source)
        elif isinstance(value, Collective):
            table.add_row(name, f"{1e6 * value.latency:.3g} us", f"{value.bandwidth:.3g} B/s", value.source)
    return table
