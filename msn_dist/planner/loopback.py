"""A sharded value table of rank 0 that needs no other ranks and no kernels, for counting what its code holds.

Its exchange returns empty buffers of the size that is expected, for an owner that is hit as its load says.  Everything
is to be run under fake tensors.

Shape suffixes: M bags of a rank, L hits a bag, H hits, W ranks, G bags looked up, R rows of a table, A rows that came,
D value width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from msn_dist.kernels.sizes import VARYING_ROWS, sorted_bytes
from msn_dist.memory.health import SlotUsage
from msn_dist.memory.placement import Placement
from msn_dist.memory.values import VALUE_DTYPES
from msn_dist.planner.layout import Layout
from msn_dist.planner.load import expected_distinct
from msn_dist.sharding.buckets import MOST_RANKS_OF_KERNEL, Buckets
from msn_dist.sharding.column import Column
from msn_dist.sharding.exchange import Flight
from msn_dist.sharding.hits import Hits
from msn_dist.sharding.local import Local
from msn_dist.sharding.lookup import ReferenceLookup
from msn_dist.sharding.replicated import Replicated, _ReplicatedLookup
from msn_dist.sharding.sharded_values import ShardedMemoryValues
from msn_dist.sharding.strategies import STRATEGIES
from msn_dist.sharding.streams import Aside
from msn_dist.sharding.two_level import TwoLevel
from msn_dist.sharding.value_optimizer import ValueOptimizer
from msn_dist.sharding.wire import wires


@dataclass(frozen=True)
class Distinct:
    """Rows that hits fall on, and how unevenly their owners are hit."""

    by_chunk: int  # of a rank's hits, of each chunk for itself, added up
    of_all: int  # of the hits of all ranks and chunks of a step
    owner_load: float = 1.0  # what comes to this owner, over the mean


@dataclass(frozen=True)
class Expected:
    """Counts that depend on where hits fall."""

    layout: Layout
    slots: int
    bags: int  # of a chunk
    hits: int
    chunks: int
    rows: Distinct | None  # None: slots are hit alike

    @property
    def block(self) -> int:
        return -(-self.slots // self.layout.world)

    @property
    def pairs(self) -> int:
        """Pairs of a bag and an owner with a hit: the hits of a bag fall on W (1 - (1 - 1 / W)^L) owners."""
        world = self.layout.world
        return round(self.bags * world * (1 - (1 - 1 / world) ** self.hits))

    @property
    def stepped(self) -> int:
        """Rows of a block that the hits of all ranks and chunks fall on."""
        if self.rows is not None:
            return -(-self.rows.of_all // self.layout.world)
        return round(expected_distinct(self.block, self.chunks * self.bags * self.hits))

    @property
    def asked(self) -> int:
        """Rows that the hits of a chunk of one rank fall on."""
        if self.rows is None:
            return round(expected_distinct(self.slots, self.bags * self.hits))
        return -(-self.rows.by_chunk // self.chunks)

    def updated(self, hits: int) -> int:
        """Rows that so many hits fall on which an owner has had, or with `column` every rank."""
        if self.layout.strategy == "column":
            return self.rows.of_all if self.rows is not None else round(expected_distinct(self.slots, hits))
        return self.stepped if self.rows is not None else round(expected_distinct(self.block, hits))

    def answer(self) -> list:
        """What the counts that ranks tell each other say, as the strategies read them."""
        world, bags = self.layout.world, self.bags
        each, total = [bags] * world, bags * self.hits
        match self.layout.strategy:
            case "column":
                return each
            case "row_gather":
                return [_split(total, world), self._come(total)]
            case "row_gather_unique":
                return [_split(self.asked, world), self._come(self.asked)]
            case "row_pooled_sparse":
                owed = self._come(self.pairs, most=bags * world)  # an owner that every bag hits
                return [[_split(total, world), _split(self.pairs, world)], [self._come(total), owed]]
        return [[_split(total, world), each], [self._come(total), each]]

    def _come(self, mean: int, most: float = math.inf) -> list[int]:
        """From each rank, where so many come to the mean owner."""
        load = 1.0 if self.rows is None else self.rows.owner_load
        return _split(round(min(load * mean, most)), self.layout.world)


def _split(total: int, parts: int) -> list[int]:
    return [total * (part + 1) // parts - total * part // parts for part in range(parts)]


class _Told(Tensor):
    """Counts that have come from other ranks: whatever is done with them, `tolist` gives the expected ones."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        told = next(leaf for leaf in tree_leaves(args) if isinstance(leaf, cls))
        return told.answer if getattr(func, "__name__", "") == "tolist" else told


class LoopbackExchange:
    """As sharding.exchange.Exchange, without other ranks."""

    memory = "a memory"
    group = None
    rank = 0

    def __init__(self, expected: Expected) -> None:
        self.world = expected.layout.world
        self._told = torch.empty(0).as_subclass(_Told)
        self._told.answer = expected.answer()

    def start(self, direction: str, name: str, sent: Tensor, send_splits: list, receive_splits: list) -> Flight:
        received = sent.new_empty(sum(receive_splits), *sent.shape[1:])
        return _Underway(received, sent.contiguous())

    def swap_counts(self, counts_WC: Tensor) -> Flight:
        return Flight(self._told)


class _Underway(Flight):
    def __init__(self, received: Tensor, sent: Tensor) -> None:
        super().__init__(received)
        self._sent = sent

    def wait(self) -> Tensor:
        self._sent = None
        return self._received


class _FbgemmStandIn:
    """What FBGEMM's table-batched embedding holds on a CPU, where its update needs no tensor but its result."""

    name = "fbgemm"

    def __init__(self, rows: int, dim: int, dtype: torch.dtype) -> None:
        self.dim, self.weight_RD = dim, torch.empty(rows, dim, dtype=dtype)
        self.anchor = torch.zeros((), requires_grad=True)
        self._last: tuple[Tensor, ...] = ()

    @property
    def kept_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._last)

    def read(self, hits: Hits, update_follows: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
        self._last = hits.rows_H, hits.offsets_G1.to(hits.rows_H.dtype)  # for its statistics, until the next look-up
        pooled_GD = hits.rows_H.new_empty(len(hits.offsets_G1) - 1, self.dim, dtype=torch.float32)
        if update_follows:
            hits.tape = pooled_GD, hits.weights_H
        return pooled_GD.detach().to(dtype)

    def update(self, hits: Hits, gradient_GD: Tensor, of_weights: bool = True) -> Tensor | None:
        tape, gradient_GD = hits.tape or self.read(hits), gradient_GD.float()
        hits.tape = None
        gradient_H = None if hits.weights_H is None else torch.empty_like(hits.weights_H)
        del tape, gradient_GD  # there until it has been run through
        return gradient_H


class _CachedStandIn(_FbgemmStandIn):
    """What `sharding.cached_lookup` holds on a GPU: an estimate, as FBGEMM's buffers are many."""

    def __init__(self, rows: int, dim: int, dtype: torch.dtype) -> None:
        super().__init__(rows, dim, dtype)
        self.rows = rows

    def read(self, hits: Hits, update_follows: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
        count = len(hits.rows_H)
        # int64 twice, and sorted with what a sort takes, to find the distinct rows
        scratch = hits.rows_H.new_empty(16 * count + sorted_bytes(count, 2**32, self.dim), dtype=torch.uint8)
        del scratch
        pooled_GD = super().read(hits, update_follows, dtype)
        self._last = *self._last, hits.rows_H.new_empty(count, dtype=torch.int32)  # places in the cache
        return pooled_GD

    def update(self, hits: Hits, gradient_GD: Tensor, of_weights: bool = True) -> Tensor | None:
        scratch = hits.rows_H.new_empty(sorted_bytes(len(hits.rows_H), self.rows, self.dim), dtype=torch.uint8)
        del scratch
        return super().update(hits, gradient_GD, of_weights)


class _TritonStandIn:
    """What sharding.triton_lookup and its kernels hold."""

    name = "triton"

    def __init__(self, rows: int, dim: int, dtype: torch.dtype) -> None:
        self.rows, self.dim, self.weight_RD = rows, dim, torch.empty(rows, dim, dtype=dtype)
        self.anchor = torch.zeros((), requires_grad=True)

    def read(self, hits: Hits, update_follows: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
        return hits.rows_H.new_empty(len(hits.offsets_G1) - 1, self.dim, dtype=dtype)

    def update(self, hits: Hits, gradient_GD: Tensor, of_weights: bool = True) -> Tensor | None:
        gradient_GD = gradient_GD.contiguous()
        gradient_H = None if hits.weights_H is None else torch.empty_like(hits.weights_H)
        scratch = hits.rows_H.new_empty(sorted_bytes(len(hits.rows_H), self.rows, self.dim), dtype=torch.uint8)
        if hits.size is None:  # bags of different sizes
            bag_H = hits.rows_H.new_empty(len(hits.rows_H), dtype=torch.int32)
            del bag_H
        del scratch
        return gradient_H

    def gather(self, rows_AD: Tensor, where_GL: Tensor, weights_GL: Tensor) -> Tensor:
        return rows_AD.new_empty(len(where_GL), self.dim)

    def gather_backward(
        self, rows_AD: Tensor, where_GL: Tensor, weights_GL: Tensor, gradient_GD: Tensor, once: bool
    ) -> tuple[Tensor, Tensor]:
        gradients = torch.empty_like(rows_AD), torch.empty_like(weights_GL)
        gradient_GD, hits = gradient_GD.contiguous(), where_GL.numel()
        # without a sort: keys and places of int32
        size = 8 * hits if once else sorted_bytes(hits, VARYING_ROWS, self.dim)
        scratch = rows_AD.new_empty(size, dtype=torch.uint8)
        del scratch
        return gradients


class _KernelSumsStandIn:
    """What sharding.kernel_sums and its kernels hold."""

    name = "triton"

    def pooled(self, table_RD: Tensor, hits: Hits, dtype: torch.dtype) -> Tensor:
        return table_RD.new_empty(len(hits.offsets_G1) - 1, table_RD.shape[1], dtype=dtype)

    def rows(self, table_RD: Tensor, rows_U: Tensor, dtype: torch.dtype) -> Tensor:
        return table_RD.new_empty(len(rows_U), table_RD.shape[1], dtype=dtype)

    def gradients(
        self,
        table_RD: Tensor,
        hits: Hits,
        gradient_GD: Tensor,
        of_weights: bool = True,
        distinct: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        values_RD, rows = table_RD, len(table_RD)
        if distinct is not None:
            values_RD, rows = self.rows(table_RD, distinct[0], table_RD.dtype), VARYING_ROWS
        gradient_RD, gradient_H = torch.empty_like(values_RD, dtype=torch.float32), torch.empty_like(hits.weights_H)
        gradient_GD = gradient_GD.contiguous()
        scratch = values_RD.new_empty(sorted_bytes(len(gradient_H), rows, values_RD.shape[1]), dtype=torch.uint8)
        del scratch
        return gradient_RD, gradient_H if of_weights else None


def _kernel_buckets(row_ML: Tensor, block: int, world: int) -> tuple[Buckets, Tensor]:
    """Of `bucket_rows_by_kernel`."""
    order_H = torch.empty(row_ML.numel(), dtype=torch.int64)
    row_H = torch.empty(row_ML.numel(), dtype=torch.int32 if block < 2**31 else torch.int64)
    return Buckets(order_H, torch.zeros(world, len(row_ML), dtype=torch.int64)), row_H


_STAND_INS = {
    ("fbgemm", "device"): _FbgemmStandIn,
    ("fbgemm", "host"): _CachedStandIn,
    ("triton", "device"): _TritonStandIn,
}


def bare_table(expected: Expected, dim: int, exchange: LoopbackExchange) -> ShardedMemoryValues:
    """The sharded table of rank 0, as its constructor makes it, without a process group."""
    layout, slots = expected.layout, expected.slots
    strategy = Local if layout.world == 1 else STRATEGIES[layout.strategy]
    device, dtype = torch.device("cpu"), VALUE_DTYPES[layout.value_dtype]
    optimizer = ValueOptimizer(kind=layout.optimizer)
    values = strategy.__new__(strategy)
    nn.Module.__init__(values)
    values.slots, values.dim, values.placement = slots, dim, Placement.permuted(slots)
    values.exchange = exchange
    values.wire = layout.wire if layout.world > 1 else "fp32"
    values.values_wire, values.gradient_wire = wires(values.wire, device, seed=0)
    values._aside = Aside(device)
    rows, sums = slots, _KernelSumsStandIn() if layout.lookup == "triton" else None
    if strategy is Column:
        columns = -(-dim // layout.world)
        values.lookup = ReferenceLookup(slots, columns, optimizer, device, dtype, 0, values._mean_square, sums)
        values.row_dtype = torch.int32 if slots < 2**31 else torch.int64
        values._first_row, rows = 0, expected.block
    elif strategy is Replicated:
        shared = sums, values.exchange, values.gradient_wire
        values.lookup = _ReplicatedLookup(slots, dim, optimizer, device, dtype, 0, *shared)
    else:
        values.block = rows = expected.block
        values.row_dtype = torch.int32 if rows < 2**31 else torch.int64
        stand_in = _STAND_INS.get((layout.lookup, layout.tier))
        values.lookup = stand_in(rows, dim, dtype) if stand_in else ReferenceLookup(rows, dim, optimizer, device, dtype)
        if layout.lookup == "triton" and layout.world <= MOST_RANKS_OF_KERNEL:
            values.bucketed = lambda slots_ML: _kernel_buckets(
                values.placement.row_of(slots_ML), values.block, layout.world
            )
    if strategy is TwoLevel:
        values.group_ranks = layout.ranks_of_group
    values.usage = SlotUsage(rows, device)
    return values
