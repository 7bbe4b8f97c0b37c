"""What is in the way where nothing fits, and which changes would fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

from msn_dist.config import MOST_ROWS
from msn_dist.errors import InputError
from msn_dist.planner.dense_trace import StepTrace
from msn_dist.planner.id_tables import NoRoom
from msn_dist.planner.search import Priced, Search, value_dtypes
from msn_dist.planner.situation import Situation
from msn_dist.units import binary

_MOST_HALVINGS = 12
_ENOUGH = 3  # kinds of change that fit
_ANY_GIB = 1e6  # of host memory
Say = Callable[[str], None]
Settings = dict[str, Any]  # of the config, by key


@dataclass(frozen=True)
class Change:
    """What to change: settings of the config, or of the topology, and what is planned for then."""

    name: str
    settings: Settings
    situation: Situation


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
        rank = max(range(len(least.storage_W)), key=lambda rank: least.storage_W[rank].host.total)
        host = least.storage_W[rank].host
        return (
            f"In the host tier rank {rank} lacks {binary(least.short_of_host)} of host memory{how}: it would take "
            f"{binary(host.total)} (values {binary(host.values)}, their copy for a checkpoint and all else in it "
            f"{binary(host.checkpoint)}) and may fill {binary(least.host_capacity)}"
        )
    rank = max(range(len(least.storage_W)), key=lambda rank: least.storage_W[rank].total)
    largest = sorted(least.storage_W[rank].kinds.items(), key=lambda kind: -kind[1])[:3]
    parts = ", ".join(f"{name.replace('_', ' ')} {binary(size)}" for name, size in largest)
    ids = "" if search.ids.tables else ", id tables not counted"
    who = f"rank {rank} lacks" if least.layout.tier == "device" else f"In the host tier rank {rank} lacks"
    return (
        f"{who} {binary(least.short)}{how}: it would take {binary(least.fullest)} "
        f"({parts}, ...{ids}) and may fill {binary(least.capacity)}"
    )


def explained(situation: Situation, lack: str, traces: dict[str, StepTrace], say: Say) -> str:
    lines = [f"{situation.config.name} does not fit {situation.topology.name}. {lack}."]
    fitting = list(_changes(situation, traces, say))
    if fitting:
        lines.append("Each of these would fit, with so much on the fullest rank:")
        width = max(len(size) for _, size in fitting)
        lines += [f"  {size:{width}}  {change}" for change, size in fitting]
    else:
        more = ", nor up to 32 times the nodes" if _has_link_between_nodes(situation) else ""
        lines.append(f"No halving of slots, width, batch or bits would fit{more}.")
    return "\n".join(lines)


def _changes(situation: Situation, traces: dict[str, StepTrace], say: Say) -> Iterator[tuple[str, str]]:
    """(what to change, bytes of the fullest rank then): of each kind the smallest change that fits.

    Several settings at once only if fewer than three kinds of change do, and none that one of these has in it.
    """
    found: list[Settings] = []
    for changes in _kinds(situation, found):
        least = _least(changes, lambda change: _fitting(change, traces, say))
        if least is not None:
            change, priced = least
            found.append(change.settings)
            yield change.name, binary(priced.fullest) + (f", host {binary(priced.host)}" if priced.host else "")


def _kinds(situation: Situation, found: Sequence[Settings]) -> Iterator[list[Change]]:
    """Each from the smallest change to the largest; `found` are those that fit, of the kinds before."""
    yield list(_to_the_host(situation))
    for change in (_narrower, _fewer_slots, _narrower_values, _smaller_batch):
        yield _of_config(situation, (change,), found)
    yield list(_more_nodes(situation))
    for several in (
        (_narrower, _fewer_slots),
        (_narrower, _narrower_values),
        (_narrower, _narrower_values, _smaller_batch),
        (_narrower, _fewer_slots, _smaller_batch),
    ):
        if len(found) < _ENOUGH:
            yield _of_config(situation, several, found)


def _fitting(change: Change, traces: dict[str, StepTrace], say: Say) -> Priced | None:
    """How it fits then; InputError if it cannot be."""
    changed = change.situation
    if changed.least_table_bytes() > changed.topology.device_bytes:
        return None
    say(f"trying {change.name}")
    try:
        found = Search(changed, traces, rounding="left out").fastest()
    except NoRoom:
        return None
    to_the_host = "memory.tier" in change.settings
    return None if to_the_host and found and found.layout.tier != "host" else found


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


def _of_config(
    situation: Situation, kinds: Sequence[Callable[[Situation], Iterator[Settings]]], found: Sequence[Settings]
) -> list[Change]:
    """Ever larger changes of so many kinds at once, up to the first that has one in it that is enough by itself."""
    changes: list[Change] = []
    for parts in zip(*(kind(situation) for kind in kinds), strict=False):
        settings = {key: value for part in parts for key, value in part.items()}
        same = bool(changes) and settings == changes[-1].settings
        if same or any(_has_in_it(settings, enough) for enough in found):
            break
        name = " ".join(f"{key}={value}" for key, value in settings.items())
        changes.append(Change(name, settings, _with(situation, settings)))
    return changes


def _has_in_it(settings: Settings, other: Settings) -> bool:
    """Whether it changes all that the other does, and as far; sizes become smaller."""
    return bool(other) and all(
        key in settings and (settings[key] == value or (isinstance(value, int) and settings[key] < value))
        for key, value in other.items()
    )


def _with(situation: Situation, settings: Settings) -> Situation:
    config = situation.config
    for key, value in settings.items():
        section, name = key.split(".")
        config = config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})
    return situation.with_config(config)


def _to_the_host(situation: Situation) -> Iterator[Change]:
    """With what else that takes: of the memory, and of a topology that does not say how much the host has."""
    memory, topology = situation.memory, situation.topology
    if memory is None or situation.why_no_host_tier() is None or situation.machine.kind == "cpu":
        return
    if situation.optimizer == "rowwise_adam":  # whose state has no cache
        return
    settings: Settings = {"memory.tier": "host"}
    if memory.lookup in ("reference", "triton"):
        settings["memory.lookup"] = "auto"
    if memory.value_dtype == "bf16":
        settings["memory.value_dtype"] = "fp16"
    if memory.strategy in ("column", "replicated"):
        settings["memory.strategy"] = "row_pooled"
    if memory.chunks > 1:
        settings["memory.chunks"] = 1
    with_host = _with(situation, settings)
    said = " ".join(f"{key}={value}" for key, value in settings.items())
    if topology.host_gib is None:
        said += ", host_gib in the topology"
        with_host = replace(with_host, topology=topology.model_copy(update={"host_gib": _ANY_GIB}))
    yield Change(said, settings, with_host)


def _narrower(situation: Situation) -> Iterator[Settings]:
    """The same however large the change is."""
    memory = situation.memory
    for dtype in value_dtypes(memory)[1:2] if memory is not None else ():
        yield from repeat({"memory.value_dtype": dtype}, _MOST_HALVINGS)


def _fewer_slots(situation: Situation) -> Iterator[Settings]:
    if situation.memory is None:
        return
    sub_keys = situation.memory.sub_keys
    for _ in range(_MOST_HALVINGS):
        sub_keys //= 2
        if sub_keys < max(2, situation.memory.top_k):
            return
        yield {"memory.sub_keys": sub_keys}


def _narrower_values(situation: Situation) -> Iterator[Settings]:
    if situation.memory is None:
        return
    dim = situation.dim // 2
    while dim >= 4 and dim % 4 == 0:
        yield {"memory.value_dim": dim}
        dim //= 2


def _smaller_batch(situation: Situation) -> Iterator[Settings]:
    batch, chunks = situation.config.data.batch_size // 2, situation.memory.chunks if situation.memory else 1
    while batch >= situation.topology.world * chunks:
        yield {"data.batch_size": batch}
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
        yield Change(f"data.batch_size={data.batch_size}, nodes: {larger.nodes} in the topology", {}, there)


def _has_link_between_nodes(situation: Situation) -> bool:
    return situation.topology.nodes > 1 or situation.topology.between_nodes is not None
