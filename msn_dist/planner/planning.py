"""From a situation to a plan with its reasons, or to what is in the way and what would help."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from msn_dist.planner.cost import ALIKE, WAITING, StepTime
from msn_dist.planner.dense_trace import StepTrace
from msn_dist.planner.id_tables import NoRoom
from msn_dist.planner.plan_file import PlanFile, PlannedMemory, PlannedPhase, PlannedTable, Rival, settings_of
from msn_dist.planner.search import Priced, Search
from msn_dist.planner.shortage import Say, explained, lack_of_all
from msn_dist.planner.simulate import simulate
from msn_dist.planner.situation import Situation
from msn_dist.units import binary


@dataclass(frozen=True)
class Infeasible:
    """Nothing fits.  The text says what is short where, and which changes would fit."""

    text: str

    def __str__(self) -> str:
        return self.text


def plan(situation: Situation, rounding: bool, date: str, say: Say = lambda line: None) -> PlanFile | Infeasible:
    """The fastest layout that fits; one that rounds more than the config only with `rounding`.

    `say` is told which changes are tried where none fits.
    """
    traces: dict[str, StepTrace] = {}
    try:
        search = Search(situation, traces, rounding="allowed" if rounding else "told")
    except NoRoom as lack:
        return Infeasible(explained(situation, f"Beside all else, {lack}", traces, say))
    priced = search.priced()
    allowed = [one for one in priced if not one.short and (rounding or search.exact(one.layout))]
    if not allowed:
        return Infeasible(explained(situation, lack_of_all(situation, priced, search), traces, say))
    chosen = allowed[0]
    rivals = _rivals(priced, chosen, search)
    topology, layout = situation.topology, chosen.layout
    return PlanFile(
        config=situation.config.name,
        topology=topology.name,
        machine=situation.machine.name,
        date=date,
        demand=_demand(situation),
        world_size=topology.world,
        ranks_per_node=topology.ranks_per_node,
        settings=settings_of(situation.config, situation.schema),
        memory=None if situation.memory is None else _memory(chosen),
        id_tables=_id_tables(chosen),
        capacity=topology.device_bytes,
        storage=_kinds([storage.kinds for storage in chosen.storage_W]),
        host_capacity=topology.host_bytes,
        host_storage=_kinds([asdict(storage.host) for storage in chosen.storage_W]) if chosen.host else {},
        phases=[
            PlannedPhase(name=phase.name, seconds=phase.seconds, hidden=phase.hidden, sent=phase.sent)
            for phase in chosen.time.phases
        ],
        owner_load=1.0 if situation.memory is None else simulate(layout, situation.load, situation.dim).owner_load,
        reason=_reason(chosen, [one for one in rivals if rounding or search.exact(one.layout)], situation)
        + _why_no_nodes(chosen, search),
        rivals=[
            Rival(
                memory=_memory(one),
                seconds=one.time.seconds,
                bytes=one.fullest,
                allocated=max(storage.allocated for storage in one.storage_W),
                rounds=not search.exact(one.layout),
                why=_lacking(one) if one.short else _slower(one.time, chosen.time),
            )
            for one in (rivals if situation.memory else ())
        ],
        seconds_over_ranks=search.seconds_over_ranks(layout, chosen.ids),
    )


def _rivals(priced: list[Priced], chosen: Priced, search: Search) -> list[Priced]:
    """All others but those that are as exact as the config in the other tier: of these the best."""
    others = [one for one in priced if one is not chosen]
    apart = [one for one in others if one.layout.tier != chosen.layout.tier and search.exact(one.layout)]
    return [one for one in others if one not in apart[1:]]


def _memory(priced: Priced) -> PlannedMemory:
    layout = priced.layout
    return PlannedMemory(
        strategy=layout.strategy,
        wire=layout.wire,
        value_dtype=layout.value_dtype,
        tier=layout.tier,
        group_ranks=layout.group_ranks,
    )


def _id_tables(chosen: Priced) -> dict[str, dict[str, PlannedTable]]:
    placed: dict[str, dict[str, PlannedTable]] = {}
    for table in chosen.ids.tables:
        whole = table.sharding == "table_wise"
        rank = table.rows_per_rank.index(max(table.rows_per_rank)) if whole else None
        placed.setdefault(table.module, {})[table.table] = PlannedTable(sharding=table.sharding, rank=rank)
    return placed


def _demand(situation: Situation) -> str:
    rows = f"{situation.rows:,} rows a rank"
    if situation.memory is None:
        return rows
    memory = situation.memory
    tables = f"{situation.memories} x {situation.slots:,} slots of {situation.dim}"
    demand = f"{rows}; {tables}, {memory.heads * memory.top_k} hits a token, {situation.popularity}"
    why = situation.why_no_fused_retrieval
    return demand if why is None else f"{demand}; retrieval by torch, not fused: {why}"


def _kinds(of_ranks: list[dict[str, int]]) -> dict[str, list[int]]:
    """{kind: bytes of each rank}, as people read the kinds."""
    return {kind.replace("_", " "): [kinds[kind] for kinds in of_ranks] for kind in of_ranks[0]}


def _reason(chosen: Priced, rivals: list[Priced], situation: Situation) -> str:
    if situation.memory is None:
        return "the model has no memory: only its id tables are placed"
    fitting = [one for one in rivals if not one.short]
    if chosen.layout.tier == "host" and not any(one.layout.tier == "device" for one in fitting):
        on_device = next(one for one in rivals if one.layout.tier == "device")
        why = f"with values on the device it {_lacking(on_device)}"
        return f"{why}; the next best is {_next_best(fitting[0], chosen)}" if fitting else why
    if situation.topology.world == 1:
        why = "one rank holds all, so all strategies are the same; it fits"
        return f"{why}; {_next_best(fitting[0], chosen)}" if fitting else why
    if not fitting:
        return f"it is the only one that fits in {situation.topology.device_gib:g} GiB a rank"
    return f"the next best is {_next_best(fitting[0], chosen)}"


def _why_no_nodes(chosen: Priced, search: Search) -> str:
    """What two_level would take in groups of a node; nothing if these are what it has."""
    if chosen.layout.group_ranks is None:
        return ""
    in_nodes = search.time(replace(chosen.layout, group_ranks=None), chosen.ids)
    return f"; in groups of a node: {_slower(in_nodes, chosen.time, ' ms')}"


def _next_best(one: Priced, chosen: Priced) -> str:
    name = str(one.layout)
    for what, theirs, ours in (
        ("values", one.layout.value_dtype, chosen.layout.value_dtype),
        ("wire", one.layout.wire, chosen.layout.wire),
    ):
        name += f" with {what} {theirs}" if theirs != ours else ""
    if one.layout.tier != chosen.layout.tier:
        name = f"{one.layout.tier} tier" if name == str(chosen.layout) else f"{one.layout.tier} tier, {name}"
    return f"{name}: {_slower(one.time, chosen.time, ' ms')}"


def _lacking(one: Priced) -> str:
    """Of what memory; of both, what it lacks of the host's is told."""
    return f"lacks {binary(one.short_of_host)} of host memory" if one.short_of_host else f"lacks {binary(one.short)}"


def _slower(one: StepTime, chosen: StepTime, unit: str = "") -> str:
    """By how much, and in which phase most of it is, in milliseconds."""
    share = one.seconds / chosen.seconds - 1
    alike = 1 / ALIKE <= one.seconds / chosen.seconds <= ALIKE
    if alike and chosen.seconds > chosen.device <= one.device:
        return f"as fast, by the host; device {1e3 * one.device:.3g}{unit}, not {1e3 * chosen.device:.3g}"
    theirs, ours = (
        {phase.name: phase.exposed for phase in time.phases if phase.name != WAITING} for time in (one, chosen)
    )
    sign = 1 if share >= 0 else -1
    most = max(theirs, key=lambda name: sign * (theirs[name] - ours[name]))
    percent = f"{share:+.1%}" if abs(share) < 0.1 else f"{share:+.0%}"
    return f"{percent}; {most} {1e3 * theirs[most]:.3g}{unit}, not {1e3 * ours[most]:.3g}"
