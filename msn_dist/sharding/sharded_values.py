"""The value table over the ranks of a process group: what all strategies share.

A step goes through TorchRec's three phases, each with the messages of the strategy:

    input_dist    slots -> rows -> the ranks that look them up
    compute       the look-up; its backward updates the rows
    output_dist   what was looked up comes home

Every gradient is exact: the weights get theirs, whole, and the values get the mean over the ranks, which is
DistributedDataParallel's convention (each rank differentiates its own loss, dense gradients are averaged).

Shape suffixes: M bags of this rank, L hits a bag, W ranks, G bags of all ranks, D value width, R rows on this rank.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.nn.modules.module import _IncompatibleKeys
from torchrec.distributed.types import Awaitable, LazyAwaitable, ShardedModule
from torchrec.optim.fused import EmptyFusedOptimizer, FusedOptimizerModule
from torchrec.streamable import Multistreamable

from msn_dist.memory.autocast import pooled_dtype
from msn_dist.memory.health import MemoryHealth, SlotUsage
from msn_dist.memory.values import MemoryValues
from msn_dist.sharding.exchange import Exchange
from msn_dist.sharding.fused_optimizer import ValueFusedOptimizer
from msn_dist.sharding.hits import Hits, Round, look_up
from msn_dist.sharding.lookup import Lookup
from msn_dist.sharding.streams import Aside
from msn_dist.sharding.wire import wires

Result = TypeVar("Result")


@dataclass
class ExchangeContext(Multistreamable):
    """What a later phase must remember of an earlier one; strategies add attributes."""

    part_of: Round = field(default_factory=Round)
    bags: int = 0  # M

    def record_stream(self, stream: torch.Stream) -> None:
        for value in vars(self).values():
            if isinstance(value, Tensor):
                value.record_stream(stream)


class Later(Awaitable[Result]):
    """The result of a function that is called when it is waited for."""

    def __init__(self, finish: Callable[[], Result]) -> None:
        super().__init__()
        self._finish = finish

    def _wait_impl(self) -> Result:
        return self._finish()


class LazyLater(LazyAwaitable[Tensor]):
    """The same for the last phase, as TorchRec's types ask for."""

    def __init__(self, finish: Callable[[], Tensor]) -> None:
        super().__init__()
        self._finish = finish

    def _wait_impl(self) -> Tensor:
        return self._finish()


class ShardedMemoryValues(ShardedModule[Hits, Tensor, Tensor, ExchangeContext], FusedOptimizerModule):
    """`MemoryValues` over W ranks: same rows, same start, same results at any W and with any strategy.

    A strategy's constructor builds `lookup` and `usage`, then calls `_register`.
    """

    lookup: Lookup
    usage: SlotUsage

    def __init__(self, table: MemoryValues, group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__()
        self.slots, self.dim, self.placement = table.slots, table.dim, table.placement
        self.exchange = Exchange(group, device)
        self.wire = table.sharding.wire if self.exchange.world > 1 else "fp32"
        self.values_wire, self.gradient_wire = wires(self.wire, device, seed=self.exchange.rank)
        self._aside = Aside(device)
        self._mesh = DeviceMesh.from_group(group, device.type)

    def _register(self, weight: Tensor, weight_at: Placement, moment_at: Placement) -> None:
        """This rank's part of the table [n, D], and which part it and the look-up's moments [n] are."""
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight._in_backward_optimizers = [EmptyFusedOptimizer()]  # for TorchRec's in_backward_optimizer_filter
        shape, kept, state = (self.slots, self.dim), self.lookup.state, {}
        if kept.moment_R is not None:
            state["moment"] = self._whole(kept.moment_R, shape[:1], moment_at)
        if kept.first_RD is not None:  # without what is beside the columns of the table
            state["first_moment"] = self._whole(kept.first_RD[:, : weight.shape[1]], shape, weight_at)
        if kept.steps is not None:
            state["step"] = kept.steps
        self._fused_optimizer = ValueFusedOptimizer(self.lookup, self._whole(weight, shape, weight_at), state)

    def _whole(self, local: Tensor, shape: tuple[int, ...], placement: Placement) -> DTensor:
        """`local` as a part of the whole tensor; blocks of ceil(size / W) are DTensor's own layout."""
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local, self._mesh, [placement], run_check=False, shape=torch.Size(shape), stride=stride
        )

    def create_context(self) -> ExchangeContext:
        return ExchangeContext()

    def forward(self, slots_ML: Tensor, weights_ML: Tensor) -> Tensor:
        """pooled_MD = sum over l of weights[m, l] * value of slots[m, l]; a collective call.

        Sums are float32, and under autocast rounded to its dtype at the end.
        """
        return self._rounded(super().forward(slots_ML, weights_ML).wait())

    def _rounded(self, pooled_MD: Tensor) -> Tensor:
        return pooled_MD.to(pooled_dtype(pooled_MD.device.type))

    def pooled_in_chunks(self, chunks: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """pooled_MD of each (slots_ML, weights_ML): messages of a chunk travel while the next one is computed.

        All ranks must come with the same number of chunks.  `chunks` is drawn from one by one; its computing is what
        the exchange hides behind.  Rows are updated once, when all chunks have their gradients.
        """
        part_of = Round()
        counted: list[tuple[ExchangeContext, Awaitable[Awaitable[Hits]], Any]] = []
        arriving: list[Awaitable[Hits]] = []
        for slots_ML, weights_ML in chunks:
            if counted:  # the chunk before, whose counts have travelled while this one was computed
                arriving.append(self._hits_depart(*counted[-1]))
            ctx = self.create_context()
            ctx.part_of = part_of
            counted.append((ctx, self.input_dist(ctx, slots_ML, weights_ML), self._aside.mark()))
        arriving.append(self._hits_depart(*counted[-1]))
        part_of.size = len(arriving)
        returning = [
            self.output_dist(ctx, self.compute(ctx, hits.wait()))
            for (ctx, *_), hits in zip(counted, arriving, strict=True)
        ]
        return [self._rounded(pooled.wait()) for pooled in returning]

    def _hits_depart(self, ctx: ExchangeContext, counts: Awaitable[Awaitable[Hits]], mark: Any) -> Awaitable[Hits]:
        # no autograd in here but the message's: what a node saves would be freed while this stream still reads it
        with self._aside.after(mark):
            hits = counts.wait()
        if mark is not None:
            ctx.record_stream(torch.cuda.current_stream())
        return hits

    @abstractmethod
    def input_dist(self, ctx: ExchangeContext, slots_ML: Tensor, weights_ML: Tensor) -> Awaitable[Awaitable[Hits]]:
        """Waiting once lets the hits depart (counts have told how many come), waiting twice lets them arrive."""

    def compute(self, ctx: ExchangeContext, dist_input: Hits) -> Tensor:
        if self.training:
            self._count(dist_input.rows_H)
        dtype = self.looked_up_dtype(dist_input.rows_H.device.type)
        return look_up(self.lookup, dist_input, self.exchange.world, ctx.part_of, dtype)

    def looked_up_dtype(self, device_type: str) -> torch.dtype:
        """Of what a look-up gives: it travels as `wire` says, or is added up."""
        return torch.float32

    @abstractmethod
    def output_dist(self, ctx: ExchangeContext, output: Tensor) -> LazyAwaitable[Tensor]: ...

    def _count(self, rows_H: Tensor) -> None:
        self.usage.count(rows_H)

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
        """{"weight": DTensor [n, D]}, sharing memory with the table; the same for every strategy.

        It is to be used before the next look-up, which may move rows into a cache.
        """
        self.lookup.settle()
        destination = {} if destination is None else destination
        destination[f"{prefix}weight"] = self._fused_optimizer.params["weight"]
        return destination

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> _IncompatibleKeys:
        if "weight" not in state_dict:
            return _IncompatibleKeys(["weight"], [])
        loaded = state_dict["weight"]
        self.lookup.settle()
        self.weight.data.copy_(loaded.to_local() if isinstance(loaded, DTensor) else loaded)
        return _IncompatibleKeys([], [key for key in state_dict if key != "weight"])
