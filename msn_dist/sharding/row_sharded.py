"""The layout that the row strategies share: rank w owns rows w * ceil(n / W) to (w + 1) * ceil(n / W) - 1.

Shape suffixes: M bags of this rank, L hits a bag, H = M * L hits.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Shard

from msn_dist.errors import InputError
from msn_dist.memory.health import SlotUsage
from msn_dist.memory.values import MemoryValues
from msn_dist.sharding.buckets import MOST_RANKS_OF_KERNEL, Buckets, bucket_rows, bucket_rows_by_kernel
from msn_dist.sharding.lookup import make_lookup
from msn_dist.sharding.sharded_values import ShardedMemoryValues
from msn_dist.sharding.value_optimizer import ValueOptimizer


class RowSharded(ShardedMemoryValues):
    """A table cut into blocks of rows."""

    def __init__(
        self, table: MemoryValues, group: dist.ProcessGroup, optimizer: ValueOptimizer, device: torch.device
    ) -> None:
        super().__init__(table, group, device)
        self.block, first_row, rows = shard_of(self.slots, self.exchange.world, self.exchange.rank)
        self.row_dtype = torch.int32 if self.block < 2**31 else torch.int64
        sharding = table.sharding
        cache = sharding.cache if sharding.tier == "host" else None
        self.lookup = make_lookup(
            sharding.lookup, rows, self.dim, optimizer, device, table.weight.dtype, table.seed, cache
        )
        table.fill(self.lookup.weight_RD, first_row)
        self.usage = SlotUsage(rows, device)
        self._register(self.lookup.weight_RD, Shard(0), Shard(0))

    def bucketed(self, slots_ML: Tensor) -> tuple[Buckets, Tensor]:
        """The hits by owner, and their rows in that order [H] of `row_dtype`, local to the owner."""
        by_kernel = self.lookup.name == "triton" and self.exchange.world <= MOST_RANKS_OF_KERNEL
        by = bucket_rows_by_kernel if by_kernel else bucket_rows
        return by(self.placement.row_of(slots_ML), self.block, self.exchange.world)


def shard_of(slots: int, world: int, rank: int) -> tuple[int, int, int]:
    """(block, first_row, rows) of `rank`: blocks of ceil(n / W) rows, the last one may be shorter."""
    block = -(-slots // world)
    if block * (world - 1) >= slots:
        raise InputError(
            f"a memory of {slots} slots leaves rank {-(-slots // block)} of {world} without rows: "
            "use fewer ranks, or more memory.sub_keys"
        )
    return block, rank * block, min(block, slots - rank * block)
