"""Prices every layout of a situation, and chooses: the fastest that fits, without a change of the numbers.

A layout is a strategy, what values are stored and travel as, and the memory that they lie in.  two_level stands there
in groups of the size that takes the least time; what it holds does not depend on it.

Layouts that round more than the config says (16 bits a value, 16 or 8 on the wire) are priced as well: to be chosen if
that is allowed, else to tell what it would gain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, get_args

from msn_dist.config import MemoryConfig, Strategy
from msn_dist.errors import InputError
from msn_dist.planner.cost import ALIKE, ModelTime, StepTime, step_time
from msn_dist.planner.dense_trace import StepTrace, trace_step
from msn_dist.planner.id_placement import IdPlan, place_ids
from msn_dist.planner.id_tables import NoRoom
from msn_dist.planner.layout import Layout, group_sizes
from msn_dist.planner.loopback import Distinct
from msn_dist.planner.situation import Situation
from msn_dist.planner.storage import Storage, rank_storage

_NARROWER = {"fp32": ("fp32", "bf16"), "bf16": ("bf16",), "fp16": ("fp16",)}
_ROUNDING, _WORTH = 3, 1 / ALIKE  # of layouts that round more the fastest few that win so much are priced in full
_WIRES = ("fp32", "bf16", "fp16", "int8")
Rounding = Literal["allowed", "told", "left out"]


@dataclass(frozen=True)
class Priced:
    """A layout with what it costs."""

    layout: Layout
    time: StepTime
    ids: IdPlan
    storage_W: list[Storage]  # of each rank
    capacity: int  # bytes that a rank may fill of its device
    host_capacity: int  # and of its host

    @property
    def fullest(self) -> int:
        """Bytes of the rank with most."""
        return max(storage.total for storage in self.storage_W)

    @property
    def host(self) -> int:
        """Bytes of the host of the rank with most; 0 in the device tier."""
        return max(storage.host.total for storage in self.storage_W)

    @property
    def short_of_host(self) -> int:
        """Bytes of the host that the fullest rank lacks."""
        return max(0, self.host - self.host_capacity)

    @property
    def short(self) -> int:
        """Bytes that the fullest rank lacks of its device and its host; 0 if it fits."""
        return max(0, self.fullest - self.capacity) + self.short_of_host


class Search:
    """Traces the model once; every layout is then a matter of arithmetic.

    `traces` keeps traces from one search to the next, and `ids` may be a placement that is good enough.  Of layouts
    that round more than the config, with `rounding` "told" those are priced that gain something on what fits; "allowed"
    ones may also be the only ones that fit.  NoRoom if the id tables fit beside no layout that may be chosen.
    """

    def __init__(
        self,
        situation: Situation,
        traces: dict[str, StepTrace] | None = None,
        ids: IdPlan | None = None,
        *,
        rounding: Rounding = "allowed",
    ) -> None:
        self.situation, self._rounding = situation, rounding
        self.trace = _traced(situation, {} if traces is None else traces)
        self._model = ModelTime.of(self.trace, situation.machine)
        self.layouts = list(self._layouts()) if situation.memory else [situation.bare_layout]
        self.ids = self._placed_ids() if ids is None else ids
        self._times = {layout: self.time(layout) for layout in self.layouts}
        may_be_chosen = self.layouts if rounding == "allowed" else filter(self.exact, self.layouts)
        self._alike = ALIKE * min(self._times[layout].seconds for layout in may_be_chosen)
        self._by_time = sorted(self.layouts, key=lambda one: self._order(self._times[one]))

    def priced(self) -> list[Priced]:
        """Those that fit by time, then the others by what they lack.

        Of layouts that round more than the config, the fastest few that are faster than all that fit; the fastest on
        the device that fits if nothing else does there, or in the host tier if nothing does at all.
        """
        priced = [self._price(layout) for layout in self._by_time if self.exact(layout)]
        rounding = [layout for layout in self._by_time if not self.exact(layout) and self._may_fit(layout)]
        allowed = self._rounding == "allowed"
        least = min((one.time.seconds for one in priced if not one.short), default=math.inf if allowed else 0.0)
        faster = [layout for layout in rounding if self._times[layout].seconds < _WORTH * least][:_ROUNDING]
        priced += map(self._price, faster)
        fits = any(not one.short for one in priced)
        left = [layout for layout in rounding if layout not in faster] if allowed or fits else []
        for tier, instead in (("device", ("device",)), ("host", ("device", "host"))):
            if not any(one.layout.tier in instead and not one.short for one in priced):
                of_tier = (self._price(layout) for layout in left if layout.tier == tier)
                priced += filter(None, [next((one for one in of_tier if not one.short), None)])
        return sorted(priced, key=lambda one: (one.short, *self._order(one.time)))

    def fastest(self) -> Priced | None:
        """Of those as exact as the config that fit."""
        fitting: list[Priced] = []
        for one in map(self._price, filter(self.exact, self._by_time)):
            fitting += [] if one.short else [one]
            if not one.short and one.ids is self.ids:  # what comes after it is slower
                break
        return min(fitting, key=lambda one: self._order(one.time), default=None)

    def _order(self, time: StepTime) -> tuple[float, float]:
        """Those that are as good as the fastest by what their devices take: for others that is the time itself."""
        return max(time.seconds, self._alike), time.device

    def time(self, layout: Layout, ids: IdPlan | None = None) -> StepTime:
        """Of one of `layouts`, or of two_level in groups of another size."""
        return step_time(self.situation, layout, self._model, (ids or self.ids).seconds)

    def _placed_ids(self) -> IdPlan:
        """Beside a layout on the device, else one that leaves more room: in the other tier, or one that rounds more.

        None are placed where no layout fits even without them.
        """
        capacity, lack = self.situation.topology.device_bytes, None
        for least in self._least_totals():
            if least > capacity:
                continue
            try:
                return place_ids(self.situation, least)
            except NoRoom as short:
                lack = short
        if lack is not None:
            raise lack
        return IdPlan([], 0.0)

    def _least_totals(self) -> Iterator[int]:
        """Bytes of the fullest rank without id tables: least of exact layouts on the device, of exact ones, of all."""
        device = [layout for layout in self.layouts if self.exact(layout) and layout.tier == "device"]
        host = [layout for layout in self.layouts if self.exact(layout) and layout.tier == "host"]
        allowed = self.layouts if self._rounding == "allowed" else []
        rounding = [layout for layout in allowed if not self.exact(layout) and self._may_fit(layout)]
        least = math.inf
        for layouts in (device, host, rounding):
            totals = (max(storage.total for storage in self._storage_W(layout, [])) for layout in layouts)
            if (total := min(totals, default=math.inf)) < least:
                yield (least := total)

    def _may_fit(self, layout: Layout) -> bool:
        """Whether its tables alone do: how much a step needs beside them can take seconds to find out."""
        least = self.situation.least_table_bytes(layout.value_dtype, layout.tier)
        return least <= self.situation.topology.device_bytes

    def _price(self, layout: Layout) -> Priced:
        """Id tables lie as beside the layout that needs least; where that is too much, in the room beside this one."""
        one = self._priced_with(layout, self.ids)
        if not one.short or one.short_of_host:
            return one
        without = max(storage.total for storage in self._storage_W(layout, []))
        if without > one.capacity:
            return one
        try:
            return self._priced_with(layout, place_ids(self.situation, without))
        except NoRoom:
            return one

    def _priced_with(self, layout: Layout, ids: IdPlan) -> Priced:
        time = self._times[layout] if ids is self.ids else self.time(layout, ids)
        topology = self.situation.topology
        storage_W = self._storage_W(layout, ids.tables)
        return Priced(layout, time, ids, storage_W, topology.device_bytes, topology.host_bytes)

    def exact(self, layout: Layout) -> bool:
        """Whether the numbers are those of the config."""
        memory = self.situation.memory
        return memory is None or (layout.wire, layout.value_dtype) == (memory.wire, memory.value_dtype)

    def seconds_over_ranks(self, chosen: Layout, ids: IdPlan) -> dict[str, list[list[float]]]:
        """{strategy: [[ranks, seconds a step], ...]} on more and fewer nodes, with as many rows a rank.

        Values are stored and travel as in the chosen layout, and the id tables are taken to cost what they do there.
        """
        here, memory = self.situation, self.situation.memory
        curves: dict[str, list[list[float]]] = {}
        for topology in _sizes(here):
            batch = here.rows * topology.world
            data = here.config.data.model_copy(update={"batch_size": batch})
            config = here.config.model_copy(update={"data": data})
            there = replace(here, config=config, topology=topology)
            for strategy in get_args(Strategy) if memory else ():
                if _why_not(there, strategy) is None and chosen.tier in _tiers(there, strategy, chosen.value_dtype):
                    layout = there.layout(strategy, chosen.wire, chosen.value_dtype, chosen.tier)
                    layout = in_best_groups(there, layout, self._model)
                    seconds = step_time(there, layout, self._model, ids.seconds).seconds
                    curves.setdefault(strategy, []).append([topology.world, seconds])
        return curves

    def _layouts(self) -> Iterator[Layout]:
        """Every one that the ranks allow; InputError with the reasons if there is none."""
        memory, world = self.situation.memory, self.situation.topology.world
        reasons = {strategy: _why_not(self.situation, strategy) for strategy in get_args(Strategy)}
        if all(reasons.values()):
            raise InputError("no strategy can serve this memory: " + "; ".join(reasons.values()))
        possible = [strategy for strategy, reason in reasons.items() if reason is None]
        if world == 1:  # all strategies are one, and nothing travels
            possible, wires = ["row_pooled"], [memory.wire]
        else:
            wires = _WIRES[_WIRES.index(memory.wire) :] if self._rounding != "left out" else [memory.wire]
        for strategy in possible:
            for dtype in value_dtypes(memory) if self._rounding != "left out" else [memory.value_dtype]:
                for wire, tier in product(wires, _tiers(self.situation, strategy, dtype)):
                    layout = self.situation.layout(strategy, wire, dtype, tier)
                    yield in_best_groups(self.situation, layout, self._model)

    def _storage_W(self, layout: Layout, tables: list) -> list[Storage]:
        situation = self.situation
        distinct = None
        if situation.memory is not None:
            load = situation.load
            distinct = Distinct(
                round(load.rows_by_chunk(1)),
                round(load.rows(layout.world)),
                load.owner_load(layout.world, once=layout.strategy == "row_gather_unique"),
            )
        with _possible_sizes(situation):
            return rank_storage(situation.config, situation.schema, layout, self.trace, tables, distinct)


def value_dtypes(memory: MemoryConfig) -> tuple[str, ...]:
    """What its values may be stored as: as it says, or narrower if its look-up can train those."""
    return (memory.value_dtype,) if memory.lookup == "fbgemm" else _NARROWER[memory.value_dtype]


def in_best_groups(situation: Situation, layout: Layout, model: ModelTime) -> Layout:
    """two_level in groups of the size whose exchange is the fastest, nodes if none is faster; others as they are."""
    if layout.strategy != "two_level":
        return layout
    sizes = group_sizes(layout.world, layout.ranks_per_node)
    return min(
        (replace(layout, group_ranks=size) for size in sizes),
        key=lambda one: step_time(situation, one, model, id_seconds=0.0).exchange,
    )


def _tiers(situation: Situation, strategy: str, value_dtype: str) -> tuple[str, ...]:
    """Where the values may lie: for the numbers it is the same."""
    reason = situation.why_no_host_tier(strategy=strategy, value_dtype=value_dtype)
    return ("device",) if reason else ("device", "host")


def _why_not(situation: Situation, strategy: str) -> str | None:
    """Why these ranks cannot have it, or None."""
    topology, slots, dim = situation.topology, situation.slots, situation.dim
    world = topology.world
    if world == 1:
        return None
    if strategy in ("column", "replicated") and situation.memory.lookup == "fbgemm":
        return f"{strategy} takes part of every step from other ranks, which lookup: fbgemm cannot"
    if strategy == "two_level" and 1 in (topology.nodes, topology.ranks_per_node):
        return "two_level needs several nodes of several ranks"  # else its bytes are row_pooled's, one after the other
    if strategy == "column" and -(-dim // world) * (world - 1) >= dim:
        return f"column: values of width {dim} leave a rank of {world} without columns"
    if -(-slots // world) * (world - 1) >= slots:
        return f"{strategy}: {slots} slots leave a rank of {world} without rows"
    return None


def _sizes(situation: Situation) -> list:
    """Topologies with 1, 2, 4, ... nodes, or ranks of the one node where a GPU's profile holds for any number.

    The planned one is among them.
    """
    topology = situation.topology
    if topology.nodes > 1:
        counts = {2**i for i in range((4 * topology.nodes).bit_length())} | {topology.nodes}
        return [topology.model_copy(update={"nodes": count}) for count in sorted(counts)]
    if situation.machine.kind == "cpu":
        return [topology]
    counts = {2**i for i in range(topology.ranks_per_node.bit_length())} | {topology.ranks_per_node}
    return [topology.model_copy(update={"ranks_per_node": count}) for count in sorted(counts)]


def _traced(situation: Situation, traces: dict[str, StepTrace]) -> StepTrace:
    config = situation.config
    kind = situation.machine.kind
    depends_on = (situation.rows, config.model, config.memory, config.training.precision, config.optimizer.dense)
    key = "|".join(map(str, depends_on))
    if key not in traces:
        with _possible_sizes(situation):
            traces[key] = trace_step(config, situation.schema, situation.rows, kind, situation.list_lengths)
    return traces[key]


@contextmanager
def _possible_sizes(situation: Situation) -> Iterator[None]:
    """InputError for a step whose tensors have more bytes than torch counts."""
    try:
        yield
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise InputError(
            f"a step of {situation.rows:,} rows a rank (data.batch_size={situation.config.data.batch_size}) needs "
            "tensors of more bytes than can be counted; lower it, or the widths of the model"
        ) from None
