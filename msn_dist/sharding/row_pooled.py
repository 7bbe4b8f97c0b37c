"""Strategies `row_pooled` and `row_pooled_sparse`: owners return partial weighted sums of the bags.

Bytes a rank sends in a step, for m bags of L hits of which A leave it, and P pairs of a bag and another rank that it
has a hit on; e_w bytes a weight (4, or 2 where `wire` is not fp32):

                row_pooled                                        row_pooled_sparse
    headers     16 a peer (counts), 1 a bag and peer (lengths)    16 a peer
    forward     A * (4 + e_w) (hits)                              the same
    returned    (W - 1) * m * row_bytes(D) over all ranks' bags   P * row_bytes(D) over all ranks' pairs
    backward    A * 4 (gradients of the weights, float32), and the gradients of what was returned: as many bytes

What is returned does not grow with L; it grows with W, in the sparse form only up to W = L.  Lengths take 4 bytes for
L >= 256, rows 8 bytes where a rank holds 2^31 or more.

Shape suffixes: M bags of this rank, L hits a bag, H hits, W ranks, G bags that a rank owes sums of, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchrec.distributed.types import Awaitable, LazyAwaitable

from msn_dist.sharding.buckets import Buckets
from msn_dist.sharding.exchange import Flight
from msn_dist.sharding.hit_wire import HitWire, weight_dtype
from msn_dist.sharding.hits import Hits, offsets_of
from msn_dist.sharding.row_sharded import RowSharded
from msn_dist.sharding.sharded_values import ExchangeContext, Later, LazyLater
from msn_dist.sharding.trip import Trip
from msn_dist.sharding.wire import Cast


@dataclass
class PooledContext(ExchangeContext):
    hits: int = 0  # L
    due_W: list[int] = field(default_factory=list)  # sums that each owner returns to this rank
    owed_W: list[int] = field(default_factory=list)  # sums that this rank returns to each
    bag_P: Tensor | None = None  # sparse: the bag of each sum that is due


class RowPooled(RowSharded):
    """Best while W is smaller than the hits of a bag."""

    def create_context(self) -> PooledContext:
        return PooledContext()

    def input_dist(self, ctx: PooledContext, slots_ML: Tensor, weights_ML: Tensor) -> Awaitable[Awaitable[Hits]]:
        buckets, row_H = self.bucketed(slots_ML)
        ctx.bags, ctx.hits = slots_ML.shape
        weights_H = weights_ML.flatten().gather(0, buckets.order_H)  # whose gradient needs no sort, as that of [] does
        sent_W2 = torch.stack([buckets.hits_W, self._sums_W(buckets)], dim=1)
        received = self.exchange.swap_counts(sent_W2)

        def hits_depart() -> Awaitable[Hits]:
            # the one synchronisation with the host, which wants the splits
            sent, owed = torch.stack([sent_W2, received.wait()]).transpose(1, 2).tolist()
            (send_W, ctx.due_W), (receive_W, ctx.owed_W) = sent, owed
            marked_H, segments = self._segments(ctx, buckets, row_H)
            wire = HitWire(marked_H, weight_dtype(self.wire))
            trip = Trip(self.exchange, "hits", send_W, receive_W, wire, Cast(torch.float32)).depart(weights_H)

            def hits_arrive() -> Hits:
                arrived_H = trip.arrive()
                return self._bags(ctx, wire.rows_H, arrived_H, segments)

            return Later(hits_arrive)

        return Later(hits_depart)

    def _sums_W(self, buckets: Buckets) -> Tensor:
        """Sums that each owner is to return."""
        return torch.full_like(buckets.hits_W, buckets.lengths_WM.shape[1])

    def _segments(self, ctx: PooledContext, buckets: Buckets, row_H: Tensor) -> tuple[Tensor, Flight | None]:
        """The rows to send, and what tells the owners which of them make a bag."""
        lengths_X = buckets.lengths_WM.flatten()
        lengths_X = lengths_X.to(torch.uint8 if ctx.hits < 256 else torch.int32)
        return row_H, self.exchange.start("forward", "lengths", lengths_X, ctx.due_W, ctx.owed_W)

    def _bags(self, ctx: PooledContext, rows_H: Tensor, weights_H: Tensor, lengths: Flight | None) -> Hits:
        return Hits(rows_H, weights_H, offsets_of(lengths.wait()))

    def output_dist(self, ctx: PooledContext, output: Tensor) -> LazyAwaitable[Tensor]:
        trip = Trip(self.exchange, "pooled", ctx.owed_W, ctx.due_W, self.values_wire, self.gradient_wire)
        trip.depart(output)
        return LazyLater(lambda: self._sum(ctx, trip.arrive()))

    def _sum(self, ctx: PooledContext, partial: Tensor) -> Tensor:
        """pooled_MD of the sums of all owners."""
        return partial.unflatten(0, (self.exchange.world, ctx.bags)).sum(0)


class RowPooledSparse(RowPooled):
    """Sums of bags without a hit do not travel: best while W is larger than the hits of a bag, and hits repeat little.

    The first hit of every pair has its row complemented, so that no lengths are needed.
    """

    def _sums_W(self, buckets: Buckets) -> Tensor:
        return buckets.pairs_W

    def _segments(self, ctx: PooledContext, buckets: Buckets, row_H: Tensor) -> tuple[Tensor, None]:
        ctx.bag_P, first_P = buckets.pairs(sum(ctx.due_W))
        return row_H.index_put((first_P,), ~row_H[first_P]), None

    def _bags(self, ctx: PooledContext, rows_H: Tensor, weights_H: Tensor, lengths: None) -> Hits:
        first_P = torch.nonzero_static(rows_H < 0, size=sum(ctx.owed_W)).flatten()
        offsets_G1 = torch.nn.functional.pad(first_P, (0, 1), value=len(rows_H))
        return Hits(torch.where(rows_H < 0, ~rows_H, rows_H), weights_H, offsets_G1)

    def _sum(self, ctx: PooledContext, partial_PD: Tensor) -> Tensor:
        return partial_PD.new_zeros(ctx.bags, self.dim).index_add(0, ctx.bag_P, partial_PD)
