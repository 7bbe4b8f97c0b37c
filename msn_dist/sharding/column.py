"""Strategy `column`: every rank holds ceil(D / W) columns of all rows, and looks up the bags of all ranks.

The hits go to everybody, so there is no owner to overload.  Row-wise moments need the mean square over whole rows: the
ranks add up the squares of their columns.  Bytes a rank sends in a step, for m bags of L hits a rank,
c = ceil(D / W), e_w bytes a weight and U distinct rows in the hits of all ranks:

    headers     8 a peer (counts)
    forward     (W - 1) * m * L * (4 + e_w) (hits)
    returned    (W - 1) * m * row_bytes(c)
    backward    (W - 1) * m * row_bytes(c), (W - 1) * m * L * 4 (gradients of the weights),
                2 * U * 4 * (W - 1) / W (squares; not for sgd)

Rows take 8 bytes for n >= 2^31.

Shape suffixes: M bags of this rank, L hits a bag, W ranks, G bags of all ranks, H hits of all ranks, U distinct rows,
C columns of a rank, D value width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torchrec.distributed.types import Awaitable, LazyAwaitable

from msn_dist.errors import InputError
from msn_dist.memory.health import MemoryHealth, SlotUsage
from msn_dist.memory.values import MemoryValues
from msn_dist.sharding.hit_wire import HitWire, weight_dtype
from msn_dist.sharding.hits import Hits
from msn_dist.sharding.lookup import ReferenceLookup, make_sums
from msn_dist.sharding.row_sharded import shard_of
from msn_dist.sharding.sharded_values import ExchangeContext, Later, LazyLater, ShardedMemoryValues
from msn_dist.sharding.trip import Trip
from msn_dist.sharding.value_optimizer import ValueOptimizer
from msn_dist.sharding.wire import Cast


@dataclass
class ColumnContext(ExchangeContext):
    bags_W: list[int] = field(default_factory=list)


def columns_of_rank(dim: int, world: int) -> int:
    """C = ceil(D / W), of all ranks but the last; InputError if that would have none."""
    width = -(-dim // world)
    if width * (world - 1) >= dim:
        raise InputError(
            f"memory.strategy=column: values of width {dim} leave a rank of {world} without columns; "
            "use fewer ranks, a larger memory.value_dim, or row_pooled"
        )
    return width


class Column(ShardedMemoryValues):
    """For few ranks with fast links, as inside a node."""

    def __init__(
        self, table: MemoryValues, group: dist.ProcessGroup, optimizer: ValueOptimizer, device: torch.device
    ) -> None:
        super().__init__(table, group, device)
        world, rank = self.exchange.world, self.exchange.rank
        width = columns_of_rank(self.dim, world)
        columns = min(width, self.dim - rank * width)
        # a last rank with fewer columns has zeros beside them, so that all messages are of one width
        dtype, seed = table.weight.dtype, table.seed
        sums = make_sums(table.sharding.lookup, device, width)
        self.lookup = ReferenceLookup(self.slots, width, optimizer, device, dtype, seed, self._mean_square, sums)
        self.lookup.weight_RD.zero_()
        weight = self.lookup.weight_RD[:, :columns]
        table.fill(weight, 0, first_column=rank * width)
        self.row_dtype = torch.int32 if self.slots < 2**31 else torch.int64
        _, self._first_row, rows = shard_of(self.slots, world, rank)  # the rows whose use this rank counts
        self.usage = SlotUsage(rows, device)
        self._register(weight, Shard(1), Replicate())

    def create_context(self) -> ColumnContext:
        return ColumnContext()

    def input_dist(self, ctx: ColumnContext, slots_ML: Tensor, weights_ML: Tensor) -> Awaitable[Awaitable[Hits]]:
        world = self.exchange.world
        ctx.bags, hits = slots_ML.shape
        counts = self.exchange.swap_counts(torch.full((world, 1), ctx.bags, device=slots_ML.device))
        row_H = self.placement.row_of(slots_ML).to(self.row_dtype).flatten().repeat(world)
        weights_H = weights_ML.flatten().repeat(world)

        def hits_depart() -> Awaitable[Hits]:
            ctx.bags_W = counts.wait().flatten().tolist()
            wire = HitWire(row_H, weight_dtype(self.wire))
            send_W, receive_W = [ctx.bags * hits] * world, [bags * hits for bags in ctx.bags_W]
            trip = Trip(self.exchange, "hits", send_W, receive_W, wire, Cast(torch.float32)).depart(weights_H)

            def hits_arrive() -> Hits:
                arrived_H = trip.arrive()
                return Hits.uniform(wire.rows_H, arrived_H, size=hits)

            return Later(hits_arrive)

        return Later(hits_depart)

    def output_dist(self, ctx: ColumnContext, output: Tensor) -> LazyAwaitable[Tensor]:
        world = self.exchange.world
        trip = Trip(self.exchange, "pooled", ctx.bags_W, [ctx.bags] * world, self.values_wire, self.gradient_wire)
        trip.depart(output)

        def side_by_side() -> Tensor:
            columns_WMC = trip.arrive().unflatten(0, (world, ctx.bags))
            return columns_WMC.transpose(0, 1).flatten(1)[:, : self.dim]

        return LazyLater(side_by_side)

    def _mean_square(self, gradient_UC: Tensor) -> Tensor:
        """[U] over the columns of all ranks, which have all had the same hits; each rank adds up some of the rows."""
        world, rank = self.exchange.world, self.exchange.rank
        rows = len(gradient_UC)
        part_W = [rows * (w + 1) // world - rows * w // world for w in range(world)]
        mine_W = [part_W[rank]] * world
        squares_U = gradient_UC.square().sum(1)
        parts = self.exchange.start("backward", "squares", squares_U, part_W, mine_W).wait()
        total = parts.unflatten(0, (world, part_W[rank])).sum(0) / self.dim
        return self.exchange.start("backward", "squares", total.repeat(world), mine_W, part_W).wait()

    def _count(self, rows_H: Tensor) -> None:
        row_H = rows_H - self._first_row
        self.usage.count(row_H[(row_H >= 0) & (row_H < len(self.usage.window_R))])

    def health(self) -> MemoryHealth:
        """As of any table, but every rank looks up every hit: nobody is overloaded."""
        health = super().health()
        return replace(health, hits_per_owner=[health.hits] * self.exchange.world, owner_load_max_over_mean=1.0)
