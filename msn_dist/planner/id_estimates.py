"""What each way to cut an id table asks of a rank, for TorchRec's planner.

TorchRec's own estimates assume a V100, halve or forget optimizer state and price the ids of a row-wise table W times
too high.  Here, for B rows a rank on W ranks, R of them a node, a table of width D that F features read with l ids a
row in all asks in a step of every rank that holds a part of it:

    sharding           ids looked up: h   sums made: b   what carries them, s = 4 * b * D bytes
    table_wise         W * B * l          W * B * F      all-to-all
    table_row_wise     W * B * l / R      W * B * F      reduce-scatter in the node, then 1 / R of s between nodes
    row_wise           B * l              W * B * F      reduce-scatter
    row_wise, no bags  B * l              B * l          all-to-all

    ids      8 bytes each and 8 for the length of each bag, by all-to-all; gradients travel the way of the sums
    time     ids, twice s; a look-up of h ids that writes s, an update of h ids that reads s
    memory   rows with their optimizer state, ids and s

A look-up and an update take what calibration has found for the ids, and beside it for the distinct rows that they fall
on: of a table of 10 rows these stay in a cache.  Ids are taken to fall evenly on rows.

An all-to-all takes as long as the slower kind of link; the rings of a reduce-scatter leave a node over the adapters of
all its ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.planner.enumerators import get_partition_by_type
from torchrec.distributed.planner.types import Enumerator, Perf, Shard, ShardEstimator, ShardingOption, Storage
from torchrec.distributed.sharding_plan import calculate_shard_sizes_and_offsets
from torchrec.distributed.types import ModuleSharder
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from msn_dist.errors import InputError
from msn_dist.planner.load import expected_distinct
from msn_dist.planner.machine import Machine
from msn_dist.planner.topology import Topology

SHARDINGS = ("table_wise", "table_row_wise", "row_wise")

_STATE = {  # of TBE, in float32 numbers: (a value, a row)
    EmbOptimType.EXACT_SGD: (0, 0),
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: (0, 1),
    EmbOptimType.EXACT_ADAGRAD: (1, 0),
    EmbOptimType.PARTIAL_ROWWISE_ADAM: (1, 1),
    EmbOptimType.ADAM: (2, 0),
}


@dataclass(frozen=True)
class IdTable:
    """One table; `fqn` as TorchRec's planner writes it."""

    path: str  # of its module
    name: str
    weight: nn.Parameter  # [rows, D]
    module: EmbeddingBagCollection | EmbeddingCollection
    row_bytes: int  # values and optimizer state
    features: int  # F
    ids: float  # l

    @property
    def fqn(self) -> str:
        return f"{self.path}.{self.name}"

    @property
    def pooled(self) -> bool:
        return isinstance(self.module, EmbeddingBagCollection)


def id_tables_of(
    model: nn.Module, sharders: Sequence[ModuleSharder], ids_per_row: Mapping[str, float]
) -> Iterator[IdTable]:
    """In the order of the model; features without an entry in `ids_per_row` have 1.

    Raises InputError if a sharder's optimizer keeps what is not known here.
    """
    sharder_of = {sharder.module_type: sharder for sharder in sharders}
    for path, module in model.named_modules():
        if (sharder := sharder_of.get(type(module))) is None:
            continue
        optimizer = (sharder.fused_params or {}).get("optimizer", EmbOptimType.EXACT_SGD)
        if optimizer not in _STATE:
            known = ", ".join(kind.name for kind in _STATE)
            raise InputError(f"{path}: what {optimizer} keeps of a row is not known to the planner; use one of {known}")
        of_value, of_row = _STATE[optimizer]
        pooled = isinstance(module, EmbeddingBagCollection)
        configs = module.embedding_bag_configs() if pooled else module.embedding_configs()
        features_of = {config.name: config.feature_names for config in configs}
        for name, weight in sharder.shardable_parameters(module).items():
            row_bytes = weight.shape[1] * (weight.element_size() + 4 * of_value) + 4 * of_row
            ids = sum(ids_per_row.get(feature, 1.0) for feature in features_of[name])
            yield IdTable(path, name, weight, module, row_bytes, len(features_of[name]), ids)


class Links:
    """Seconds of a collective in which every rank has so many bytes, those for itself among them."""

    def __init__(self, topology: Topology, machine: Machine) -> None:
        if (inside := topology.inside_node) is not None:
            latency, self._inside = inside.latency, inside.bytes_per_second
        else:
            latency, self._inside = machine.all_to_all.latency, machine.all_to_all.bandwidth
        self._between = self._inside
        if topology.nodes > 1:
            latency = max(latency, topology.between_nodes.latency)
            self._between = topology.between_nodes.bytes_per_second
        self.latency = latency if topology.world > 1 else 0.0
        self._nodes, self._local, self._world = topology.nodes, topology.ranks_per_node, topology.world

    def all_to_all(self, size: float) -> float:
        near, far = self._local - 1, self._world - self._local
        return size / self._world * max(near / self._inside, far / self._between)

    def reduce_scatter(self, size: float) -> float:
        slower = self._inside if self._nodes == 1 else min(self._inside, self._local * self._between)
        return size * (self._world - 1) / self._world / slower

    def two_stages(self, size: float) -> float:
        near, far = (self._local - 1) / self._local, (self._nodes - 1) / self._nodes
        return size * near / self._inside + size / self._local * far / self._between


class IdEstimator(ShardEstimator):
    """Sets storage (bytes) and `Perf` (seconds) of every shard; ids count as `fwd_comms`, which is in its total."""

    def __init__(self, tables: Mapping[str, IdTable], topology: Topology, machine: Machine, batch_rows: int) -> None:
        self._tables, self._links, self._machine = tables, Links(topology, machine), machine
        self._world, self._rows = topology.world, batch_rows * topology.world
        self._sharers = {"table_wise": 1, "table_row_wise": topology.ranks_per_node, "row_wise": topology.world}
        self._tier = "hbm" if machine.kind == "cuda" else "ddr"

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: object = None) -> None:
        for option in sharding_options:
            table, dim = self._tables[option.fqn], option.tensor.shape[1]
            sharers = self._sharers[option.sharding_type]
            hits = self._rows * table.ids / sharers
            bags = self._rows * table.features if table.pooled else 0
            ids, sums = 8 * (hits + bags), 4 * dim * (bags or hits)
            carried, passed = self._carrier(option)(sums), sums / self._machine.copy_rate.at(sums)
            asked = hits, expected_distinct(len(table.weight), hits * sharers) / sharers, option.tensor[0].nbytes
            slower_read, slower_update = self._machine.tbe
            perf = Perf(
                fwd_compute=slower_read * self._machine.read_seconds(*asked) + passed,
                fwd_comms=self._links.all_to_all(ids) + carried,
                bwd_compute=slower_update * self._machine.update_seconds(*asked) + passed,
                bwd_comms=carried,
            )
            in_flight = math.ceil(ids + sums)
            storage_of = {  # one object for all shards of a size: the planner copies plans
                rows: Storage(**{"hbm": 0, "ddr": 0, self._tier: rows * table.row_bytes + in_flight})
                for rows in {shard.size[0] for shard in option.shards}
            }
            for shard in option.shards:
                shard.storage, shard.perf = storage_of[shard.size[0]], perf

    def _carrier(self, option: ShardingOption) -> Callable[[float], float]:
        match option.sharding_type:
            case "table_row_wise":
                return self._links.two_stages
            case "row_wise" if option.is_pooled:
                return self._links.reduce_scatter
            case _:
                return self._links.all_to_all


class IdOptions(Enumerator):
    """Every way to cut each table that leaves none of its ranks without rows.

    TorchRec's own enumerator does not cut rows on a CPU, and copies every shard of every option.
    """

    def __init__(
        self, tables: Mapping[str, IdTable], topology: Topology, shardings: Sequence[str], estimator: IdEstimator
    ) -> None:
        self._tables, self._topology, self._shardings, self._estimator = tables, topology, shardings, estimator

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder]) -> list[ShardingOption]:
        options = [option for table in self._tables.values() for option in self._of_table(table)]
        self.populate_estimates(options)
        return options

    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        self._estimator.estimate(sharding_options)

    def _of_table(self, table: IdTable) -> list[ShardingOption]:
        """The coarsest first."""
        world, local = self._topology.world, self._topology.ranks_per_node
        options = []
        for sharding in self._allowed(table):
            sizes, offsets = calculate_shard_sizes_and_offsets(table.weight, world, local, sharding)
            if not sizes[-1][0]:
                continue
            options.append(
                ShardingOption(
                    name=table.name,
                    tensor=table.weight,
                    module=(table.path, table.module),
                    input_lengths=[table.ids],
                    batch_size=1,
                    sharding_type=sharding,
                    partition_by=get_partition_by_type(sharding),
                    compute_kernel="fused",
                    shards=[Shard(size, offset) for size, offset in zip(sizes, offsets, strict=True)],
                    is_pooled=table.pooled,
                )
            )
        if not options:
            raise InputError(
                f"{table.path}: table {table.name!r} is read as sequences, and its {len(table.weight)} rows leave a "
                f"rank of {world} without any; use fewer ranks, or model.attention=false"
            )
        return options

    def _allowed(self, table: IdTable) -> list[str]:
        if self._topology.world == 1:
            return ["table_wise"]
        if not table.pooled:  # TorchRec's unpooled look-up fails on a gloo rank that holds no part of any table
            return ["row_wise"]
        finer = [sharding for sharding in SHARDINGS[1:] if sharding in self._shardings]
        if min(self._topology.nodes, self._topology.ranks_per_node) == 1 and "table_row_wise" in finer:
            finer.remove("table_row_wise")
        return ["table_wise", *finer]
