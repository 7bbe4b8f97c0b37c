"""Id tables over ranks, by TorchRec's planner with our options, estimates and search (`id_estimates`).

Its own search takes a minute for 1,024 ranks.  This one starts from whole tables, and step by step cuts a table finer
that burdens the busiest rank; each step is dealt to the ranks anew.

Shape suffixes: W ranks, NR node and place in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    KernelConfig,
    Partitioner,
    Proposer,
    ShardingOption,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ModuleSharder, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from msn_dist.planner.id_estimates import SHARDINGS, IdEstimator, IdOptions, IdTable, Links, id_tables_of
from msn_dist.planner.machine import Machine
from msn_dist.planner.topology import Topology
from msn_dist.units import binary

COLLECTIVES = {"table_wise": 4, "table_row_wise": 6, "row_wise": 4}  # lengths, ids, sums, gradients
_STEPS = 32  # for each way of cutting; with more tables than this, several are cut at once
_AS_FAST = 1.05  # so close to the fastest, the plan that fills its fullest rank least is the better one


@dataclass(frozen=True)
class IdPlacement:
    """Where one id table lies."""

    sharding: str  # table_wise, table_row_wise (over the ranks of one node) or row_wise (over all)
    rows_per_rank: list[int]


@dataclass(frozen=True)
class IdTablesPlan:
    """The id tables of a model over ranks, and what they take."""

    placements: dict[str, dict[str, IdPlacement]]  # by path of the module and table
    sharding: ShardingPlan  # the same, as DistributedModelParallel takes it
    table_bytes_W: list[int]  # values and optimizer state
    exchange_bytes_W: list[int]  # ids and sums for the rows of all ranks, in flight; a rank's own features are extra
    seconds_W: list[float]  # of a step, if ranks did not wait for each other


class NoRoom(Exception):
    """Nothing fits: in the nearest plan `rank` lacks `missing_bytes`, and `table` (path and name) takes most of it."""

    def __init__(self, missing_bytes: int, rank: int, table: str) -> None:
        super().__init__(f"id tables: rank {rank} lacks {binary(missing_bytes)}, mostly for {table}")
        self.missing_bytes, self.rank, self.table = missing_bytes, rank, table


def plan_id_tables(
    model: nn.Module,
    sharders: Sequence[ModuleSharder],
    topology: Topology,
    machine: Machine,
    batch_rows: int,
    reserved_bytes: int,
    *,
    ids_per_row: Mapping[str, float] | None = None,
    shardings: Sequence[str] = SHARDINGS[1:],
) -> IdTablesPlan:
    """Of the plans tried that fit, the one whose fullest rank holds least, within 5 % of the fastest's busiest rank.

    `model` may be on the meta device.  Modules other than EmbeddingBagCollection and EmbeddingCollection are left out;
    what a rank needs for them and for all else is `reserved_bytes`.  `batch_rows` are those of a rank; `ids_per_row` is
    the mean length of the lists of a feature, 1 if not given; `shardings` may be used, besides table_wise.

    Raises InputError if attention reads a table with too few rows for every rank to hold one, NoRoom if nothing fits.
    """
    ours = [sharder for sharder in sharders if sharder.module_type in (EmbeddingBagCollection, EmbeddingCollection)]
    tables = {table.fqn: table for table in id_tables_of(model, ours, ids_per_row or {})}
    estimator = IdEstimator(tables, topology, machine, batch_rows)
    search = _Search(topology, topology.device_bytes - reserved_bytes, Links(topology, machine).latency)
    planner = EmbeddingShardingPlanner(
        topology=TopologyFactory.create_topology(  # estimator and search know bandwidths and room
            TrainerConfig(world_size=topology.world, local_world_size=topology.ranks_per_node),
            kernel_config=KernelConfig(compute_device=machine.kind),
        ),
        batch_size=batch_rows,
        enumerator=IdOptions(tables, topology, shardings, estimator),
        storage_reservation=FixedPercentageStorageReservation(0.0),
        proposer=search,
        partitioner=search,
        stats=NoopEmbeddingStats(),
    )
    sharding = planner.plan(model, ours)
    return _described(sharding, search.found, tables, topology.world)


@dataclass(frozen=True)
class _Deal:
    """One option a table, dealt to ranks."""

    options: list[ShardingOption]
    first_rank: dict[str, int]  # of each table
    bytes_W: np.ndarray
    seconds_W: np.ndarray

    def ranks(self, option: ShardingOption) -> slice:
        first = self.first_rank[option.fqn]
        return slice(first, first + len(option.shards))


class _Search(Proposer, Partitioner):
    """Proposes the best deal that it finds; `room` is what a rank may fill with id tables."""

    def __init__(self, topology: Topology, room: int, latency: float) -> None:
        self._shape, self._room, self._latency = (topology.nodes, topology.ranks_per_node), room, latency
        self.found: _Deal | None = None
        self._proposals: list[list[ShardingOption]] = []

    def load(self, search_space: list[ShardingOption], enumerator: object = None) -> None:
        options_of: dict[str, list[ShardingOption]] = {}
        for option in search_space:
            options_of.setdefault(option.fqn, []).append(option)
        deals = self._deals(options_of)
        fitting = [deal for deal in deals if not self._missing(deal)]
        if not fitting:
            raise self._no_room(min(deals, key=self._missing))
        fastest = min(deal.seconds_W.max() for deal in fitting)
        as_fast = [deal for deal in fitting if deal.seconds_W.max() <= _AS_FAST * fastest]
        self.found = min(as_fast, key=lambda deal: (deal.bytes_W.max(), deal.seconds_W.max()))
        self._proposals = [self.found.options]

    def propose(self) -> list[ShardingOption] | None:
        return self._proposals.pop() if self._proposals else None

    def feedback(self, *args: object, **kwargs: object) -> None:
        """There is only one proposal."""

    def partition(self, proposal: list[ShardingOption], storage_constraint: object) -> list[ShardingOption]:
        for option in proposal:
            for rank, shard in enumerate(option.shards, self.found.first_rank[option.fqn]):
                shard.rank = rank
        return proposal

    def _deals(self, options_of: dict[str, list[ShardingOption]]) -> list[_Deal]:
        """From all tables cut as little as can be to all cut as finely; what burdens the busiest rank goes first."""
        deals, cut = [], dict.fromkeys(options_of, 0)
        while True:
            deal = self._dealt([options[cut[fqn]] for fqn, options in options_of.items()])
            deals.append(deal)
            movable = [option for option in deal.options if cut[option.fqn] + 1 < len(options_of[option.fqn])]
            if not movable:
                return deals
            load_W, part = (deal.bytes_W, _bytes) if self._missing(deal) else (deal.seconds_W, _seconds)
            movable.sort(key=lambda o: (load_W[deal.first_rank[o.fqn]], part(o), _bytes(o)), reverse=True)
            for option in movable[: -(-len(cut) // _STEPS)]:
                cut[option.fqn] += 1

    def _dealt(self, options: list[ShardingOption]) -> _Deal:
        """The most finely cut first, then by time: each onto the least busy rank or node that has room for it."""
        bytes_NR, seconds_NR = np.zeros(self._shape, np.int64), np.zeros(self._shape)
        nodes, local = self._shape
        first_rank = {}
        for option in sorted(options, key=lambda o: (-len(o.shards), -_seconds(o), -_bytes(o), o.fqn)):
            where, first = (slice(None), slice(None)), 0
            if option.sharding_type == "table_row_wise":
                node = self._least(bytes_NR.max(1), seconds_NR.max(1), option)
                where, first = (node, slice(None)), node * local
            elif option.sharding_type == "table_wise":  # of equal ranks those of other nodes first
                place, node = divmod(self._least(bytes_NR.T.ravel(), seconds_NR.T.ravel(), option), nodes)
                where, first = (node, place), node * local + place
            bytes_NR[where] += _bytes(option)
            seconds_NR[where] += _seconds(option)
            first_rank[option.fqn] = first
        together = {(option.path, option.sharding_type) for option in options}  # TorchRec sends these in one message
        latency = self._latency * sum(COLLECTIVES[sharding] for _, sharding in together)
        return _Deal(options, first_rank, bytes_NR.ravel(), seconds_NR.ravel() + latency)

    def _least(self, bytes_X: np.ndarray, seconds_X: np.ndarray, option: ShardingOption) -> int:
        """The least busy place with room, of equally busy ones the emptiest; without room anywhere the emptiest."""
        fits_X = bytes_X + _bytes(option) <= self._room
        busy_X = np.where(fits_X, seconds_X, np.inf)
        return int(np.where(busy_X == busy_X.min(), bytes_X, np.inf).argmin())

    def _missing(self, deal: _Deal) -> int:
        return max(0, int(deal.bytes_W.max()) - self._room)

    def _no_room(self, deal: _Deal) -> NoRoom:
        rank = int(deal.bytes_W.argmax())
        there = [option for option in deal.options if deal.ranks(option).start <= rank < deal.ranks(option).stop]
        return NoRoom(self._missing(deal), rank, max(there, key=_bytes).fqn)


def _bytes(option: ShardingOption) -> int:
    """Of the first shard, which is the largest."""
    return option.shards[0].storage.hbm + option.shards[0].storage.ddr


def _seconds(option: ShardingOption) -> float:
    return option.shards[0].perf.total


def _described(sharding: ShardingPlan, deal: _Deal | None, tables: dict[str, IdTable], world: int) -> IdTablesPlan:
    placements: dict[str, dict[str, IdPlacement]] = {}
    table_W, exchange_W, seconds_W = np.zeros(world, np.int64), np.zeros(world, np.int64), np.zeros(world)
    for option in deal.options if deal else []:
        row_bytes, rows_W = tables[option.fqn].row_bytes, np.zeros(world, np.int64)
        rows_W[deal.ranks(option)] = [shard.size[0] for shard in option.shards]
        table_W += rows_W * row_bytes
        exchange_W[deal.ranks(option)] += _bytes(option) - option.shards[0].size[0] * row_bytes
        seconds_W = deal.seconds_W
        placements.setdefault(option.path, {})[option.name] = IdPlacement(option.sharding_type, rows_W.tolist())
    return IdTablesPlan(placements, sharding, table_W.tolist(), exchange_W.tolist(), seconds_W.tolist())
