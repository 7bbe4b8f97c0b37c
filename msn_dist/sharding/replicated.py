"""Strategy `replicated`: every rank has the whole table and looks up its own bags; the update is shared.

In the backward each rank owns a block of rows: it receives their gradients from all ranks, steps them, and sends the
new rows to all.  So replicas stay equal to the last bit, and the optimizer's state is cut into blocks.  Bytes a rank
sends in a step, for n slots of width D, whatever the batch:

    backward    n * row_bytes(D) * (W - 1) / W (gradients)        n * 4 D * (W - 1) / W (new rows, always float32)
                n * (W - 1) / W (which rows were hit; for rowwise_adam)

Shape suffixes: M bags, L hits a bag, W ranks, n slots, R rows of this rank's block, D value width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Shard
from torch.nn.modules.module import _IncompatibleKeys
from torchrec.distributed.types import Awaitable, LazyAwaitable, LazyNoWait, NoWait

from msn_dist.memory.health import MemoryHealth, SlotUsage
from msn_dist.memory.values import MemoryValues
from msn_dist.sharding.exchange import Exchange
from msn_dist.sharding.hits import Hits
from msn_dist.sharding.lookup import ReferenceLookup, make_sums
from msn_dist.sharding.row_sharded import shard_of
from msn_dist.sharding.sharded_values import ExchangeContext, ShardedMemoryValues
from msn_dist.sharding.sums import Sums
from msn_dist.sharding.value_optimizer import ValueOptimizer, ValueState
from msn_dist.sharding.wire import Wire


class Replicated(ShardedMemoryValues):
    """For tables so small that sending them costs less than sending hits."""

    def __init__(
        self, table: MemoryValues, group: dist.ProcessGroup, optimizer: ValueOptimizer, device: torch.device
    ) -> None:
        super().__init__(table, group, device)
        dtype, seed = table.weight.dtype, table.seed
        sums = make_sums(table.sharding.lookup, device, self.dim)
        shared = sums, self.exchange, self.gradient_wire
        self.lookup = _ReplicatedLookup(self.slots, self.dim, optimizer, device, dtype, seed, *shared)
        table.fill(self.lookup.weight_RD, 0)
        self.usage = SlotUsage(self.slots, device)
        self._register(self.lookup.block_RD, Shard(0), Shard(0))

    def input_dist(self, ctx: ExchangeContext, slots_ML: Tensor, weights_ML: Tensor) -> Awaitable[Awaitable[Hits]]:
        row_H = self.placement.row_of(slots_ML).flatten()
        return NoWait(NoWait(Hits.uniform(row_H, weights_ML.flatten().to(torch.float32), size=slots_ML.shape[1])))

    def output_dist(self, ctx: ExchangeContext, output: Tensor) -> LazyAwaitable[Tensor]:
        return LazyNoWait(output)

    def health(self) -> MemoryHealth:
        """As of any table; a rank has counted its own hits only, and every rank looks up those."""
        group, usage = self.exchange.group, self.usage
        hits_W = torch.zeros(self.exchange.world, dtype=torch.int64, device=usage.window_R.device)
        hits_W[self.exchange.rank] = usage.window_R.sum()
        dist.all_reduce(hits_W, group=group)
        dist.all_reduce(usage.window_R, group=group)
        health = usage.rows(self.lookup.block).read(self.slots, group)
        usage.window_R.zero_()
        load = float(hits_W.max() / hits_W.double().mean()) if health.hits else 1.0
        return replace(health, hits_per_owner=hits_W.tolist(), owner_load_max_over_mean=load)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> _IncompatibleKeys:
        """A collective call: each rank has loaded its block."""
        result = super().load_state_dict(state_dict, strict)
        self.lookup.share_block()
        return result


class _ReplicatedLookup(ReferenceLookup):
    def __init__(
        self,
        slots: int,
        dim: int,
        optimizer: ValueOptimizer,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        sums: Sums | None,
        exchange: Exchange,
        wire: Wire,
    ) -> None:
        super().__init__(slots, dim, optimizer, device, dtype, seed, sums=sums)
        self._exchange, self._wire = exchange, wire
        shards = [shard_of(slots, exchange.world, rank) for rank in range(exchange.world)]
        _, first_row, rows = shards[exchange.rank]
        self.block = slice(first_row, first_row + rows)
        self._rows_W, self._mine_W = [rows for *_, rows in shards], [rows] * exchange.world
        self.block_RD = self.weight_RD[self.block]
        self.state = ValueState.of(optimizer.kind, rows, dim, device)

    def update(self, hits: Hits, gradient_GD: Tensor, of_weights: bool = True) -> Tensor | None:
        gradient_nD, gradient_H = self.sums.gradients(self.weight_RD, hits, gradient_GD, of_weights)
        parts = self._to_owners("table_gradient", self._wire.encode(gradient_nD))
        gradient_RD = self._wire.decode(parts).unflatten(0, (self._exchange.world, -1)).sum(0)
        if self.optimizer.kind == "rowwise_adam":
            rows_X = self._rows_hit(hits)
            self.step_rows(self.block_RD, rows_X, gradient_RD[rows_X])
        else:  # rows that nobody has hit have a gradient of 0, which leaves them as they are
            self.step_rows(self.block_RD, slice(None), gradient_RD)
        self.share_block()
        return gradient_H

    def _rows_hit(self, hits: Hits) -> Tensor:
        """Rows of this rank's block that any rank has hit; a hit of weight 0 is one."""
        hit_n = torch.zeros(len(self.weight_RD), dtype=torch.uint8, device=self.weight_RD.device)
        hit_n[hits.rows_H] = 1
        return self._to_owners("rows_hit", hit_n).unflatten(0, (self._exchange.world, -1)).any(0).nonzero().flatten()

    def _to_owners(self, name: str, of_rows_n: Tensor) -> Tensor:
        """What each rank has of this rank's rows, one rank's after the other's."""
        return self._exchange.start("backward", name, of_rows_n, self._rows_W, self._mine_W).wait()

    def share_block(self) -> None:
        """Give this rank's rows to all and take theirs; a collective call."""
        mine = self.block_RD.to(torch.float32).repeat(self._exchange.world, 1)
        self.weight_RD.copy_(self._exchange.start("backward", "table", mine, self._mine_W, self._rows_W).wait())
