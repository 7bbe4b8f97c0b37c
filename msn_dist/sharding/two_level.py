"""Strategy `two_level`: as `row_pooled`, but the sums of a bag are added up in groups of ranks before they leave these.

Groups are consecutive ranks, those of a node unless `memory.group_ranks` says else.  With Q = W / V groups of V ranks,
rank (q, v) is rank q * V + v.  The sum for a bag of rank (q, v) goes from owner (p, u) to (p, v), which adds the V sums
of its group and sends one to (q, v), which adds the Q sums of the groups.  Bytes that a rank returns for m bags a rank,
and as many for their gradients, of nodes of N ranks:

                    all                              of these between nodes
                                                     V divides N                  N divides V
    in the group    (V - 1) * Q * m * row_bytes(D)   none                         (V - N) * Q * m * row_bytes(D)
    across groups   (Q - 1) * m * row_bytes(D)       (W - N) / V * m * row_bytes(D)   all

In all they are the (W - 1) * m * row_bytes(D) of `row_pooled`, of which (W - N) * m * row_bytes(D) leave the node.

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


def ranks_of_group(asked: int | None, world: int, ranks_per_node: int) -> int:
    """V of W ranks: as `memory.group_ranks` asks, else a node.

    InputError if the ranks are not whole groups, or what is asked for leaves one of the two levels without others.
    """
    if asked is None:
        if world % ranks_per_node:
            raise InputError(
                f"memory.strategy=two_level: {world} ranks are not a multiple of the {ranks_per_node} "
                "of this node; start as many on every node, set memory.group_ranks, or use row_pooled"
            )
        return ranks_per_node
    sizes = [size for size in range(2, world) if world % size == 0]
    if asked not in sizes:
        others = f"set it to {', '.join(map(str, sizes))}, or " if sizes else ""
        raise InputError(
            f"memory.group_ranks={asked}: {world} ranks are not several groups of {asked}; "
            f"{others}leave it out for groups of a node"
        )
    return asked


class TwoLevel(RowPooled):
    """Best where groups are joined by links much slower than those inside."""

    def __init__(
        self,
        table: MemoryValues,
        group: dist.ProcessGroup,
        optimizer: ValueOptimizer,
        device: torch.device,
        group_ranks: int,
    ) -> None:
        """`group_ranks`: V, a divisor of W."""
        super().__init__(table, group, optimizer, device)
        self.group_ranks = group_ranks

    def output_dist(self, ctx: PooledContext, output: Tensor) -> LazyAwaitable[Tensor]:
        world, inside = self.exchange.world, self.group_ranks
        mine, place = divmod(self.exchange.rank, inside)
        bags_W = ctx.owed_W
        bags_QV = [bags_W[first : first + inside] for first in range(0, world, inside)]
        # homes with the same place in their groups next to each other
        parts_W = output.split(bags_W)
        by_place_GD = torch.cat([parts_W[q * inside + v] for v in range(inside) for q in range(len(bags_QV))])
        send_W, receive_W = [0] * world, [0] * world
        for v in range(inside):
            send_W[mine * inside + v] = sum(bags_V[v] for bags_V in bags_QV)
            receive_W[mine * inside + v] = sum(bags_V[place] for bags_V in bags_QV)
        trip = Trip(self.exchange, "pooled_in_group", send_W, receive_W, self.values_wire, self.gradient_wire)
        trip.depart(by_place_GD)

        def across_groups() -> Tensor:
            of_group_SD = trip.arrive().unflatten(0, (inside, receive_W[mine * inside])).sum(0)
            send_W, receive_W2 = [0] * world, [0] * world
            for q, bags_V in enumerate(bags_QV):
                send_W[q * inside + place] = bags_V[place]
                receive_W2[q * inside + place] = ctx.bags
            home = Trip(self.exchange, "pooled", send_W, receive_W2, self.values_wire, self.gradient_wire)
            return home.depart(of_group_SD).arrive().unflatten(0, (len(bags_QV), ctx.bags)).sum(0)

        return LazyLater(across_groups)
