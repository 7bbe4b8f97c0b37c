"""Strategies `row_gather` and `row_gather_unique`: owners return the rows, which are weighted at home.

Weights do not travel, nor do their gradients.  Bytes a rank sends in a step, for hits of which A leave it (`unique`:
for A distinct rows among those, of each chunk for itself):

    headers     8 a peer (counts)
    forward     A * 4 (rows)
    returned    A * row_bytes(D) over all ranks' hits
    backward    A * row_bytes(D) (the gradient of each row that came)

What is returned grows with L (or the distinct rows) and not with W.  Rows take 8 bytes where a rank holds 2^31 or more.

Shape suffixes: M bags of this rank, L hits a bag, H hits, W ranks, A rows asked for, Y rows owed, D value width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchrec.distributed.types import Awaitable, LazyAwaitable

from msn_dist.sharding.buckets import distinct_rows
from msn_dist.sharding.hits import Hits
from msn_dist.sharding.home_bags import home_bags
from msn_dist.sharding.row_sharded import RowSharded
from msn_dist.sharding.sharded_values import ExchangeContext, Later, LazyLater
from msn_dist.sharding.trip import Trip


@dataclass
class GatherContext(ExchangeContext):
    weights_ML: Tensor | None = None
    where_ML: Tensor | None = None  # the place of each hit's row among those that come
    due_W: list[int] = field(default_factory=list)  # rows that each owner returns to this rank
    owed_W: list[int] = field(default_factory=list)  # rows that this rank returns to each


class RowGather(RowSharded):
    """Every hit has its row sent: best at large W, and where hits repeat little."""

    once = True  # each row that comes has one hit

    def create_context(self) -> GatherContext:
        return GatherContext()

    def input_dist(self, ctx: GatherContext, slots_ML: Tensor, weights_ML: Tensor) -> Awaitable[Awaitable[Hits]]:
        ctx.weights_ML = weights_ML
        row_H, ctx.where_ML, asked_W = self._ask(slots_ML)
        received = self.exchange.swap_counts(asked_W[:, None])

        def rows_depart() -> Awaitable[Hits]:
            # the one synchronisation with the host, which wants the splits
            ctx.due_W, ctx.owed_W = torch.stack([asked_W, received.wait()[:, 0]]).tolist()
            rows = self.exchange.start("forward", "rows", row_H[: sum(ctx.due_W)], ctx.due_W, ctx.owed_W)

            def rows_arrive() -> Hits:
                return Hits.uniform(rows.wait(), None, size=1)

            return Later(rows_arrive)

        return Later(rows_depart)

    def _ask(self, slots_ML: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(row_H, where_ML, asked_W): the first asked_W.sum() of row_H are asked for, owner after owner.

        where_ML has the place of each hit's row among them.
        """
        buckets, row_H = self.bucketed(slots_ML)
        where_H = torch.empty_like(buckets.order_H)
        where_H[buckets.order_H] = torch.arange(len(where_H), device=where_H.device)
        return row_H, where_H.view_as(slots_ML), buckets.hits_W

    def output_dist(self, ctx: GatherContext, output: Tensor) -> LazyAwaitable[Tensor]:
        trip = Trip(self.exchange, "values", ctx.owed_W, ctx.due_W, self.values_wire, self.gradient_wire)
        trip.depart(output)
        return LazyLater(
            lambda: home_bags(
                self.lookup, trip.arrive(), ctx.where_ML, ctx.weights_ML.to(torch.float32), once=self.once
            )
        )


class RowGatherUnique(RowGather):
    """A row that many hits of a rank share is sent to it once a chunk, and its gradients go back added up.

    Memory health counts it once a rank and chunk, as its owner sees it once.
    """

    once = False

    def _ask(self, slots_ML: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return distinct_rows(self.placement.row_of(slots_ML), self.block, self.exchange.world)
