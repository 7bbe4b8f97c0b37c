"""The value table over the ranks of a process group, strategy `row_pooled`.

Rows lie in blocks of ceil(n / W).  Each hit goes to the owner of its row with its weight, the owner
sums what it holds of every bag, the sums come home and are added up:

    input_dist    slots -> rows -> (owner, local row); all-to-all of rows and weights
    compute       the owner's lookup; its backward updates the rows (row-wise Adagrad)
    output_dist   the owners' partial sums return, and are summed at home

Gradients reach the weights (a reverse all-to-all of one scalar a hit), and the convention is that of
DistributedDataParallel: each rank differentiates its own loss, dense gradients are averaged over
ranks, and so are the gradients of the values.

Shape suffixes: M bags of this rank, L hits a bag, W ranks, G bags of all ranks, H hits received,
D value width, R rows on this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.modules.module import _IncompatibleKeys
from torchrec.distributed.types import Awaitable, LazyAwaitable, LazyNoWait, NoWait, ShardedModule
from torchrec.optim.fused import EmptyFusedOptimizer, FusedOptimizerModule
from torchrec.streamable import Multistreamable

from msn_dist.errors import InputError
from msn_dist.memory.health import MemoryHealth, SlotUsage
from msn_dist.memory.values import MemoryValues
from msn_dist.sharding.exchange import Exchange, scale_gradient
from msn_dist.sharding.fused_optimizer import ValueFusedOptimizer
from msn_dist.sharding.lookup import LOOKUPS, ValueOptimizer


@dataclass
class Hits(Multistreamable):
    """What an owner looks up: bag g holds hits offsets[g] to offsets[g + 1] - 1."""

    rows_H: Tensor  # int32 (int64 for more than 2^31 rows a rank), local to the owner
    weights_H: Tensor
    offsets_G1: Tensor  # int64

    def record_stream(self, stream: torch.Stream) -> None:
        for tensor in (self.rows_H, self.weights_H, self.offsets_G1):
            tensor.record_stream(stream)


@dataclass
class ExchangeContext(Multistreamable):
    """What output_dist must remember of input_dist."""

    bags_per_rank: list[int] = field(default_factory=list)

    def record_stream(self, stream: torch.Stream) -> None:
        pass


class ShardedMemoryValues(ShardedModule[Hits, Tensor, Tensor, ExchangeContext], FusedOptimizerModule):
    """`MemoryValues` over W ranks: same rows, same start, same results at any W."""

    def __init__(
        self, table: MemoryValues, group: dist.ProcessGroup, optimizer: ValueOptimizer, device: torch.device
    ) -> None:
        super().__init__()
        self.slots, self.dim, self.placement = table.slots, table.dim, table.placement
        self.exchange = Exchange(group)
        self.block, first_row, rows = shard_of(table.slots, group.size(), group.rank())
        self.row_dtype = torch.int32 if self.block < 2**31 else torch.int64
        self.lookup = LOOKUPS[table.lookup_kind](rows, table.dim, optimizer, device)
        table.fill(self.lookup.weight_RD, first_row)
        self.usage = SlotUsage(rows, device)
        self.weight = nn.Parameter(self.lookup.weight_RD, requires_grad=False)
        self.weight._in_backward_optimizers = [EmptyFusedOptimizer()]  # for TorchRec's in_backward_optimizer_filter
        mesh = DeviceMesh.from_group(group, device.type)
        self._fused_optimizer = ValueFusedOptimizer(
            self.lookup,
            weight=self._whole(self.lookup.weight_RD, mesh),
            moment=self._whole(self.lookup.moment_R, mesh),
        )

    def _whole(self, local: Tensor, mesh: DeviceMesh) -> DTensor:
        """This rank's rows as a part of the whole table; blocks of ceil(n / W) are DTensor's own layout."""
        shape = (self.slots, *local.shape[1:])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride)

    def create_context(self) -> ExchangeContext:
        return ExchangeContext()

    def forward(self, slots_ML: Tensor, weights_ML: Tensor) -> Tensor:
        """pooled_MD = sum over l of weights[m, l] * value of slots[m, l]; a collective call."""
        return super().forward(slots_ML, weights_ML).wait()

    def input_dist(self, ctx: ExchangeContext, slots_ML: Tensor, weights_ML: Tensor) -> Awaitable[Awaitable[Hits]]:
        bags, hits = slots_ML.shape
        world, exchange = self.exchange.world, self.exchange
        rows_H = self.placement.row_of(slots_ML).flatten()
        owner_H = rows_H // self.block
        # a stable sort keeps the hits of a bag together; few owners fit a byte, which sorts faster
        order_H = owner_H.to(torch.uint8 if world <= 256 else torch.int32).argsort(stable=True)
        bag_H = torch.arange(bags, device=rows_H.device).repeat_interleave(hits)
        lengths_WM = torch.bincount(owner_H * bags + bag_H, minlength=world * bags).view(world, bags)
        hits_W = lengths_WM.sum(1)
        received = exchange.swap_counts(torch.stack([hits_W, torch.full_like(hits_W, bags)], dim=1))
        send, receive = hits_W.tolist(), [hits for hits, _ in received]
        ctx.bags_per_rank = [bags for _, bags in received]

        lengths_WM = lengths_WM.to(torch.uint8 if hits < 256 else torch.int32).flatten()
        lengths_G = exchange.all_to_all("lengths", lengths_WM, [bags] * world, ctx.bags_per_rank)
        local_H = (rows_H - owner_H * self.block).to(self.row_dtype)
        rows_H = exchange.all_to_all("rows", local_H[order_H], send, receive)
        weights_H = exchange.all_to_all("weights", weights_ML.flatten()[order_H], send, receive)
        offsets_G1 = nn.functional.pad(lengths_G.to(torch.int64).cumsum(0), (1, 0))
        return NoWait(NoWait(Hits(rows_H, weights_H, offsets_G1)))

    def compute(self, ctx: ExchangeContext, dist_input: Hits) -> Tensor:
        if self.training:
            self.usage.count(dist_input.rows_H)
        # values get the mean of the ranks' gradients; weights belong to one rank and get theirs whole
        weights_H = scale_gradient(dist_input.weights_H, self.exchange.world)
        partial_GD = self.lookup(dist_input.rows_H, dist_input.offsets_G1, weights_H)
        return scale_gradient(partial_GD, 1 / self.exchange.world)

    def output_dist(self, ctx: ExchangeContext, output: Tensor) -> LazyAwaitable[Tensor]:
        return LazyNoWait(self.exchange.sum_at_home(output, ctx.bags_per_rank))

    def health(self) -> MemoryHealth:
        """How the slots were used since the last call, over all ranks; a collective call."""
        return self.usage.read(self.slots, self.exchange.group)

    @property
    def unsharded_module_type(self) -> type[MemoryValues]:
        return MemoryValues

    @property
    def fused_optimizer(self) -> ValueFusedOptimizer:
        return self._fused_optimizer

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator:
        yield (f"{prefix}.weight" if prefix else "weight"), self.weight

    def state_dict(self, destination: dict | None = None, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        """{"weight": DTensor [n, D]}, sharing memory with the table."""
        destination = {} if destination is None else destination
        destination[f"{prefix}weight"] = self._fused_optimizer.params["weight"]
        return destination

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> _IncompatibleKeys:
        if "weight" not in state_dict:
            return _IncompatibleKeys(["weight"], [])
        loaded = state_dict["weight"]
        self.lookup.weight_RD.copy_(loaded.to_local() if isinstance(loaded, DTensor) else loaded)
        return _IncompatibleKeys([], [key for key in state_dict if key != "weight"])


def shard_of(slots: int, world: int, rank: int) -> tuple[int, int, int]:
    """(block, first_row, rows) of `rank`: blocks of ceil(n / W) rows, the last one may be shorter."""
    block = -(-slots // world)
    if block * (world - 1) >= slots:
        raise InputError(
            f"a memory of {slots} slots leaves rank {-(-slots // block)} of {world} without rows: "
            "use fewer ranks, or more memory.sub_keys"
        )
    return block, rank * block, min(block, slots - rank * block)
