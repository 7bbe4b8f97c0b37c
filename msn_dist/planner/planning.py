"""From a situation to a plan with its reasons, or to what is in the way and what would help."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from msn_dist.config import MOST_ROWS
from msn_dist.errors import InputError
from msn_dist.planner.cost import WAITING
from msn_dist.planner.dense_trace import StepTrace
from msn_dist.planner.id_tables import NoRoom
from msn_dist.planner.plan_file import PlanFile, PlannedMemory, PlannedPhase, PlannedTable, Rival, settings_of
from msn_dist.planner.search import Priced, Search
from msn_dist.planner.simulate import simulate
from msn_dist.planner.situation import Situation
from msn_dist.planner.storage import Storage
from msn_dist.units import binary

_MOST_HALVINGS = 12
_ENOUGH = 3  # changes that fit; with fewer, two at once are tried


@dataclass(frozen=True)
class Infeasible:
    """Nothing fits.  The text says what is short where, and which changes would fit."""

    text: str

    def __str__(self) -> str:
        return self.text


def plan(situation: Situation, rounding: bool, date: str) -> PlanFile | Infeasible:
    """The fastest layout that fits; one that rounds more than the config only with `rounding`."""
    traces: dict[str, StepTrace] = {}
    try:
        search = Search(situation, traces)
    except NoRoom as lack:
        return Infeasible(_explained(situation, f"Beside all else, {lack}", traces))
    priced = search.priced()
    allowed = [one for one in priced if not one.short and (rounding or search.exact(one.layout))]
    if not allowed:
        least = min(priced, key=lambda one: (not search.exact(one.layout), one.short))
        return Infeasible(_explained(situation, _lack(situation, least, search), traces))
    chosen = allowed[0]
    rivals = [one for one in priced if one is not chosen]
    topology, layout = situation.topology, chosen.layout
    return PlanFile(
        config=situation.config.name,
        topology=topology.name,
        machine=situation.machine.name,
        date=date,
        demand=_demand(situation),
        world_size=topology.world,
        ranks_per_node=topology.ranks_per_node,
        settings=settings_of(situation.config),
        memory=None if situation.memory is None else _memory(chosen),
        id_tables=_id_tables(search),
        capacity=topology.device_bytes,
        storage=_kinds(chosen),
        phases=[
            PlannedPhase(name=phase.name, seconds=phase.seconds, hidden=phase.hidden, sent=phase.sent)
            for phase in chosen.time.phases
        ],
        owner_load=1.0 if situation.memory is None else simulate(layout, situation.load, situation.dim).owner_load,
        reason=_reason(chosen, [one for one in rivals if rounding or search.exact(one.layout)], situation),
        rivals=[
            Rival(
                memory=_memory(one),
                seconds=one.time.seconds,
                bytes=one.fullest,
                rounds=not search.exact(one.layout),
                why=f"lacks {binary(one.short)}" if one.short else _slower(one, chosen),
            )
            for one in (rivals if situation.memory else ())
        ],
        seconds_over_ranks=search.seconds_over_ranks(),
    )


def _memory(priced: Priced) -> PlannedMemory:
    layout = priced.layout
    return PlannedMemory(strategy=layout.strategy, wire=layout.wire, value_dtype=layout.value_dtype)


def _id_tables(search: Search) -> dict[str, dict[str, PlannedTable]]:
    placed: dict[str, dict[str, PlannedTable]] = {}
    for table in search.ids.tables:
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
    return f"{rows}; {tables}, {memory.heads * memory.top_k} hits a token, {situation.popularity}"


def _kinds(priced: Priced) -> dict[str, list[int]]:
    """{kind: bytes of each rank}, as people read the kinds."""
    return {
        kind.name.replace("_", " "): [getattr(storage, kind.name) for storage in priced.storage_W]
        for kind in fields(Storage)
    }


def _reason(chosen: Priced, rivals: list[Priced], situation: Situation) -> str:
    if situation.memory is None:
        return "the model has no memory: only its id tables are placed"
    if situation.topology.world == 1:
        return "one rank holds all, so all strategies are the same; it fits"
    fitting = [one for one in rivals if not one.short]
    if not fitting:
        return f"it is the only one that fits in {situation.topology.device_gib:g} GiB a rank"
    return f"the next best is {fitting[0].layout.strategy}: {_slower(fitting[0], chosen)}"


def _slower(one: Priced, chosen: Priced) -> str:
    """By how much, and in which phase most of it is."""
    if all(any(phase.name == WAITING for phase in priced.time.phases) for priced in (one, chosen)):
        return f"as fast, the host is slower: device {1e3 * one.time.device:.3g}, not {1e3 * chosen.time.device:.3g}"
    share = one.time.seconds / chosen.time.seconds - 1
    theirs, ours = (
        {phase.name: phase.exposed for phase in priced.time.phases if phase.name != WAITING}
        for priced in (one, chosen)
    )
    sign = 1 if share >= 0 else -1
    most = max(theirs, key=lambda name: sign * (theirs[name] - ours[name]))
    percent = f"{share:+.1%}" if abs(share) < 0.1 else f"{share:+.0%}"
    return f"{percent}; {most} {1e3 * theirs[most]:.3g}, not {1e3 * ours[most]:.3g}"


def _lack(situation: Situation, least: Priced, search: Search) -> str:
    rank = max(range(len(least.storage_W)), key=lambda rank: least.storage_W[rank].total)
    largest = sorted(_kinds(least).items(), key=lambda kind: -kind[1][rank])[:3]
    parts = ", ".join(f"{name} {binary(sizes_W[rank])}" for name, sizes_W in largest)
    how = f" with {least.layout.strategy}, which needs least" if situation.memory else ""
    ids = "" if search.ids.tables else ", id tables not counted"
    return (
        f"rank {rank} lacks {binary(least.short)}{how}: it would take {binary(least.fullest)} "
        f"({parts}, ...{ids}) and may fill {binary(least.capacity)}"
    )


def _explained(situation: Situation, lack: str, traces: dict[str, StepTrace]) -> str:
    lines = [f"{situation.config.name} does not fit {situation.topology.name}. {lack}."]
    fitting = list(_changes(situation, traces))
    if fitting:
        lines.append("Each of these would fit, with so much on the fullest rank:")
        width = max(len(change) for change, _ in fitting)
        lines += [f"  {change:{width}}  {binary(size)}" for change, size in fitting]
    else:
        lines.append("No halving of slots, width, batch or bits would fit, nor up to 32 times the nodes.")
    return "\n".join(lines)


def _changes(situation: Situation, traces: dict[str, StepTrace]) -> Iterator[tuple[str, int]]:
    """(what to change, bytes of the fullest rank then): of each kind the smallest change that fits."""
    found = 0
    for changes in (_narrower, _fewer_slots, _narrower_values, _smaller_batch, _more_nodes, _both):
        if changes is _both and found >= _ENOUGH:
            return
        for name, changed in changes(situation):
            if changed.least_table_bytes > changed.topology.device_bytes:
                continue
            try:
                search = Search(changed, traces)
            except (NoRoom, InputError):
                continue
            if fitting := search.fastest():
                found += 1
                yield name, fitting.fullest
                break


def _with_memory(situation: Situation, **changes: object) -> Situation:
    memory = situation.memory.model_copy(update=changes)
    return situation.with_config(situation.config.model_copy(update={"memory": memory}))


def _narrower(situation: Situation) -> Iterator[tuple[str, Situation]]:
    if situation.memory is not None and situation.memory.value_dtype == "fp32":
        yield "memory.value_dtype=bf16", _with_memory(situation, value_dtype="bf16")


def _fewer_slots(situation: Situation) -> Iterator[tuple[str, Situation]]:
    if situation.memory is None:
        return
    sub_keys = situation.memory.sub_keys
    for _ in range(_MOST_HALVINGS):
        sub_keys //= 2
        if sub_keys < situation.memory.top_k:
            return
        yield f"memory.sub_keys={sub_keys}", _with_memory(situation, sub_keys=sub_keys)


def _narrower_values(situation: Situation) -> Iterator[tuple[str, Situation]]:
    if situation.memory is None:
        return
    dim = situation.dim // 2
    while dim >= 4 and dim % 4 == 0:
        yield f"memory.value_dim={dim}", _with_memory(situation, value_dim=dim)
        dim //= 2


def _both(situation: Situation) -> Iterator[tuple[str, Situation]]:
    """Fewer slots of 16 bits, as many as fit."""
    for bits, narrower in _narrower(situation):
        for slots, fewer in _fewer_slots(narrower):
            yield f"{bits} {slots}", fewer


def _smaller_batch(situation: Situation) -> Iterator[tuple[str, Situation]]:
    batch = situation.config.data.batch_size // 2
    while batch >= situation.topology.world:
        data = situation.config.data.model_copy(update={"batch_size": batch})
        config = situation.config.model_copy(update={"data": data})
        yield f"data.batch_size={batch}", situation.with_config(config)
        batch //= 2


def _more_nodes(situation: Situation) -> Iterator[tuple[str, Situation]]:
    """The batch grows along."""
    topology = situation.topology
    if topology.nodes == 1 and topology.between_nodes is None:
        return
    for factor in (2, 4, 8, 16, 32):
        larger = topology.model_copy(update={"nodes": factor * topology.nodes})
        if situation.config.data.batch_size * factor > MOST_ROWS:
            return
        data = situation.config.data.model_copy(update={"batch_size": factor * situation.config.data.batch_size})
        config = situation.config.model_copy(update={"data": data})
        there = Situation(config, situation.schema, larger, situation.machine, situation.popularity)
        yield f"data.batch_size={data.batch_size}, nodes: {larger.nodes} in the topology", there
