"""Strategy `two_level`: as `row_pooled`, but the sums of a bag are added up inside a node before they leave it.

With V ranks a node and Q = W / V nodes, rank (q, v) is rank q * V + v.  The sum for a bag of rank (q, v) goes from
owner (p, u) to (p, v), which adds the V sums of its node and sends one to (q, v), which adds the Q sums of the nodes.
Bytes that a rank returns for m bags a rank, and as many for their gradients:

    inside the node    (V - 1) * Q * m * row_bytes(D)
    between nodes      (Q - 1) * m * row_bytes(D)         row_pooled: (W - V) * m * row_bytes(D)

Shape suffixes: M bags of this rank, G bags of all ranks, S bags of the ranks (any, v), D value width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.types import LazyAwaitable

from msn_dist.errors import InputError
from msn_dist.memory.values import MemoryValues
from msn_dist.sharding.row_pooled import PooledContext, RowPooled
from msn_dist.sharding.sharded_values import LazyLater
from msn_dist.sharding.trip import Trip
from msn_dist.sharding.value_optimizer import ValueOptimizer


class TwoLevel(RowPooled):
    """Best where nodes are joined by links much slower than those inside."""

    def __init__(
        self,
        table: MemoryValues,
        group: dist.ProcessGroup,
        optimizer: ValueOptimizer,
        device: torch.device,
        ranks_per_node: int,
    ) -> None:
        super().__init__(table, group, optimizer, device)
        if self.exchange.world % ranks_per_node:
            raise InputError(
                f"memory.strategy=two_level: {self.exchange.world} ranks are not a multiple of the {ranks_per_node} "
                "of this node; start as many on every node, or use row_pooled"
            )
        self.ranks_per_node = ranks_per_node

    def output_dist(self, ctx: PooledContext, output: Tensor) -> LazyAwaitable[Tensor]:
        world, inside = self.exchange.world, self.ranks_per_node
        node, place = divmod(self.exchange.rank, inside)
        bags_W = ctx.owed_W
        bags_QV = [bags_W[first : first + inside] for first in range(0, world, inside)]
        # homes with the same place in their nodes next to each other
        parts_W = output.split(bags_W)
        by_place_GD = torch.cat([parts_W[q * inside + v] for v in range(inside) for q in range(len(bags_QV))])
        send_W, receive_W = [0] * world, [0] * world
        for v in range(inside):
            send_W[node * inside + v] = sum(bags_V[v] for bags_V in bags_QV)
            receive_W[node * inside + v] = sum(bags_V[place] for bags_V in bags_QV)
        trip = Trip(self.exchange, "pooled_in_node", send_W, receive_W, self.values_wire, self.gradient_wire)
        trip.depart(by_place_GD)

        def across_nodes() -> Tensor:
            of_node_SD = trip.arrive().unflatten(0, (inside, receive_W[node * inside])).sum(0)
            send_W, receive_W2 = [0] * world, [0] * world
            for q, bags_V in enumerate(bags_QV):
                send_W[q * inside + place] = bags_V[place]
                receive_W2[q * inside + place] = ctx.bags
            home = Trip(self.exchange, "pooled", send_W, receive_W2, self.values_wire, self.gradient_wire)
            return home.depart(of_node_SD).arrive().unflatten(0, (len(bags_QV), ctx.bags)).sum(0)

        return LazyLater(across_nodes)
