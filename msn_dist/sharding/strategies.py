"""The exchange strategies by their names in a config."""

from __future__ import annotations

import torch
import torch.distributed as dist

from msn_dist.memory.values import MemoryValues
from msn_dist.sharding.column import Column, columns_of_rank
from msn_dist.sharding.local import Local
from msn_dist.sharding.replicated import Replicated
from msn_dist.sharding.row_gather import RowGather, RowGatherUnique
from msn_dist.sharding.row_pooled import RowPooled, RowPooledSparse
from msn_dist.sharding.sharded_values import ShardedMemoryValues
from msn_dist.sharding.two_level import TwoLevel, ranks_of_group
from msn_dist.sharding.value_optimizer import ValueOptimizer

STRATEGIES: dict[str, type[ShardedMemoryValues]] = {
    "row_pooled": RowPooled,
    "row_pooled_sparse": RowPooledSparse,
    "row_gather": RowGather,
    "row_gather_unique": RowGatherUnique,
    "two_level": TwoLevel,
    "column": Column,
    "replicated": Replicated,
}


def require_ranks(strategy: str, group_ranks: int | None, dim: int, world: int, ranks_per_node: int) -> None:
    """InputError if the strategy cannot have values of `dim` numbers on so many ranks."""
    if world > 1 and strategy == "two_level":
        ranks_of_group(group_ranks, world, ranks_per_node)
    if world > 1 and strategy == "column":
        columns_of_rank(dim, world)


def shard_values(
    table: MemoryValues,
    group: dist.ProcessGroup,
    optimizer: ValueOptimizer,
    device: torch.device,
    ranks_per_node: int,
) -> ShardedMemoryValues:
    """`table` over the ranks of `group`, as `table.sharding` says; a collective call.

    `ranks_per_node` is the size of two_level's groups where `table.sharding` has none.
    """
    if group.size() == 1:
        return Local(table, group, optimizer, device)
    strategy = STRATEGIES[table.sharding.strategy]
    if strategy is TwoLevel:
        group_ranks = ranks_of_group(table.sharding.group_ranks, group.size(), ranks_per_node)
        return TwoLevel(table, group, optimizer, device, group_ranks)
    return strategy(table, group, optimizer, device)
