"""What is in the way where nothing fits, and which changes would fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

from msn_dist.config import MOST_ROWS
from msn_dist.errors import InputError
from msn_dist.planner.dense_trace import StepTrace
from msn_dist.planner.id_tables import NoRoom
from msn_dist.planner.search import Priced, Search, value_dtypes
from msn_dist.planner.situation import Situation
from msn_dist.units import binary

_MOST_HALVINGS = 12
_ENOUGH = 3  # changes that fit; with fewer, two at once are tried
_ANY_GIB = 1e6  # of host memory
Say = Callable[[str], None]
Change = tuple[str, Situation]  # what to change, and what is planned for then


def lack_of_all(situation: Situation, priced: list[Priced], search: Search) -> str:
    """What is short on the device, and in the host tier of which memory."""
    exact = [one for one in priced if search.exact(one.layout)]
    told = []
    for tier in ("device", "host"):
        of_tier = [one for one in exact if one.layout.tier == tier]
        if of_tier:
            told.append(_lack_of(min(of_tier, key=lambda one: one.short), situation, search))
    return ". ".join(told)


def _lack_of(least: Priced, situation: Situation, search: Search) -> str:
    """Of the fullest rank."""
    how = f" with {least.layout}, which needs least" if situation.memory else ""
    if least.short_of_host:
        host = max((storage.host for storage in least.storage_W), key=lambda host: host.total)
        return (
            f"In the host tier it lacks {binary(least.short_of_host)} of host memory{how}: it would take "
            f"{binary(host.total)} (values {binary(host.values)}, their copy for a checkpoint and all else in it "
            f"{binary(host.checkpoint)}) and may fill {binary(least.host_capacity)}"
        )
    rank = max(range(len(least.storage_W)), key=lambda rank: least.storage_W[rank].total)
    largest = sorted(least.storage_W[rank].kinds.items(), key=lambda kind: -kind[1])[:3]
    parts = ", ".join(f"{name.replace('_', ' ')} {binary(size)}" for name, size in largest)
    ids = "" if search.ids.tables else ", id tables not counted"
    who = f"rank {rank} lacks" if least.layout.tier == "device" else "In the host tier it lacks"
    return (
        f"{who} {binary(least.short)}{how}: it would take {binary(least.fullest)} "
        f"({parts}, ...{ids}) and may fill {binary(least.capacity)}"
    )


def explained(situation: Situation, lack: str, traces: dict[str, StepTrace], say: Say) -> str:
    lines = [f"{situation.config.name} does not fit {situation.topology.name}. {lack}."]
    fitting = list(_changes(situation, traces, say))
    if fitting:
        lines.append("Each of these would fit, with so much on the fullest rank:")
        width = max(len(change) for change, _ in fitting)
        lines += [f"  {change:{width}}  {size}" for change, size in fitting]
    else:
        more = ", nor up to 32 times the nodes" if _has_link_between_nodes(situation) else ""
        lines.append(f"No halving of slots, width, batch or bits would fit{more}.")
    return "\n".join(lines)


def _changes(situation: Situation, traces: dict[str, StepTrace], say: Say) -> Iterator[tuple[str, str]]:
    """(what to change, bytes of the fullest rank then): of each kind the smallest change that fits."""
    one_thing = _to_the_host, _narrower, _fewer_slots, _narrower_values, _smaller_batch, _more_nodes
    found = 0
    for changes in (*one_thing, _fewer_slots_of_16_bits, _smaller_in_all):
        if changes not in one_thing and found >= _ENOUGH:
            return

        def fitting(change: tuple[str, Situation], to_the_host: bool = changes is _to_the_host) -> Priced | None:
            name, changed = change
            if changed.least_table_bytes() > changed.topology.device_bytes:
                return None
            say(f"trying {name}")
            try:
                found = Search(changed, traces, rounding=False).fastest()
            except NoRoom:
                return None
            return None if to_the_host and found and found.layout.tier != "host" else found

        if (least := _least(list(changes(situation)), fitting)) is not None:
            found += 1
            (name, _), priced = least
            yield name, binary(priced.fullest) + (f", host {binary(priced.host)}" if priced.host else "")


def _least(changes: list[Change], fitting: Callable[[Change], Priced | None]) -> tuple[Change, Priced] | None:
    """The first of ever larger changes that fits, and how: where one fits, all after it do that are possible at all."""
    first, end, least = 0, len(changes), None
    while first < end:
        middle = (first + end) // 2
        try:
            found = fitting(changes[middle])
        except InputError:  # too large a change, such as ranks without a row
            end = middle
            continue
        if found is not None:
            end, least = middle, (changes[middle], found)
        else:
            first = middle + 1
    return least


def _with_memory(situation: Situation, **changes: object) -> Situation:
    memory = situation.memory.model_copy(update=changes)
    return situation.with_config(situation.config.model_copy(update={"memory": memory}))


def _to_the_host(situation: Situation) -> Iterator[Change]:
    """With what else that takes: of the memory, and of a topology that does not say how much the host has."""
    memory, topology = situation.memory, situation.topology
    if memory is None or situation.why_no_host_tier() is None or situation.machine.kind == "cpu":
        return
    if situation.optimizer == "rowwise_adam":  # whose state has no cache
        return
    changes: dict[str, str | int] = {}
    if memory.lookup in ("reference", "triton"):
        changes["lookup"] = "auto"
    if memory.value_dtype == "bf16":
        changes["value_dtype"] = "fp16"
    if memory.strategy in ("column", "replicated"):
        changes["strategy"] = "row_pooled"
    if memory.chunks > 1:
        changes["chunks"] = 1
    with_host = _with_memory(situation, tier="host", **changes)
    said = " ".join(["memory.tier=host", *(f"memory.{name}={value}" for name, value in changes.items())])
    if topology.host_gib is None:
        said += ", host_gib in the topology"
        with_host = replace(with_host, topology=topology.model_copy(update={"host_gib": _ANY_GIB}))
    yield said, with_host


def _narrower(situation: Situation) -> Iterator[Change]:
    memory = situation.memory
    for dtype in value_dtypes(memory)[1:] if memory is not None else ():
        yield f"memory.value_dtype={dtype}", _with_memory(situation, value_dtype=dtype)


def _fewer_slots(situation: Situation) -> Iterator[Change]:
    if situation.memory is None:
        return
    sub_keys = situation.memory.sub_keys
    for _ in range(_MOST_HALVINGS):
        sub_keys //= 2
        if sub_keys < max(2, situation.memory.top_k):
            return
        yield f"memory.sub_keys={sub_keys}", _with_memory(situation, sub_keys=sub_keys)


def _narrower_values(situation: Situation) -> Iterator[Change]:
    if situation.memory is None:
        return
    dim = situation.dim // 2
    while dim >= 4 and dim % 4 == 0:
        yield f"memory.value_dim={dim}", _with_memory(situation, value_dim=dim)
        dim //= 2


def _fewer_slots_of_16_bits(situation: Situation) -> Iterator[Change]:
    for bits, narrower in islice(_narrower(situation), 1):
        for slots, fewer in _fewer_slots(narrower):
            yield f"{bits} {slots}", fewer


def _smaller_in_all(situation: Situation) -> Iterator[Change]:
    """A fourth of the slots and half of the batch, again and again; of 16 bits."""
    for bits, narrower in islice(_narrower(situation), 1):
        for (slots, fewer), (rows, smaller) in zip(_fewer_slots(narrower), _smaller_batch(narrower), strict=False):
            data = smaller.config.data
            yield f"{bits} {slots} {rows}", fewer.with_config(fewer.config.model_copy(update={"data": data}))


def _smaller_batch(situation: Situation) -> Iterator[Change]:
    batch, chunks = situation.config.data.batch_size // 2, situation.memory.chunks if situation.memory else 1
    while batch >= situation.topology.world * chunks:
        data = situation.config.data.model_copy(update={"batch_size": batch})
        config = situation.config.model_copy(update={"data": data})
        yield f"data.batch_size={batch}", situation.with_config(config)
        batch //= 2


def _more_nodes(situation: Situation) -> Iterator[Change]:
    """The batch grows along."""
    topology = situation.topology
    if not _has_link_between_nodes(situation):
        return
    for factor in (2, 4, 8, 16, 32):
        larger = topology.model_copy(update={"nodes": factor * topology.nodes})
        if situation.config.data.batch_size * factor > MOST_ROWS:
            return
        data = situation.config.data.model_copy(update={"batch_size": factor * situation.config.data.batch_size})
        config = situation.config.model_copy(update={"data": data})
        there = replace(situation, config=config, topology=larger)
        yield f"data.batch_size={data.batch_size}, nodes: {larger.nodes} in the topology", there


def _has_link_between_nodes(situation: Situation) -> bool:
    return situation.topology.nodes > 1 or situation.topology.between_nodes is not None
