"""Bytes of memory that a training run takes on each rank, by kind, from the configuration alone.

They are the device's; of the host's memory only what values that lie there take is counted.

What stays between steps is counted by formula; what a step needs at its peak comes from a trace of the model
(`dense_trace`) and of the exchange (`exchange_storage`), which never make a tensor.

At any time t of a step the rank holds

    live(t)                  what the model itself holds, as traced
    + saved and outputs      of every look-up whose backward is still to come
    + forward or backward    of the look-up that is under way, if one is

and the peak is the largest such sum.

On a GPU the dense gradients count twice.  DistributedDataParallel makes its buckets anew once it knows the order in
which gradients come, with TorchRec's static_graph in the forward of the third step; the old ones are given back some
steps later, it seems when NCCL's watchdog has looked at their last all-reduce.

Buffers of an exchange are those of the busiest owner, on every rank: any may be it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from msn_dist.config import RunConfig
from msn_dist.memory.values import VALUE_DTYPES
from msn_dist.planner.dense_trace import LookUp, Span, StepTrace
from msn_dist.planner.exchange_storage import ExchangeBytes, exchange_bytes
from msn_dist.planner.host_tier import cache_bytes
from msn_dist.planner.layout import Layout
from msn_dist.planner.loopback import Distinct
from msn_dist.sharding.value_optimizer import state_bytes

if TYPE_CHECKING:
    from msn_dist.data.schema import Schema
    from msn_dist.planner.plan import TableShards

_USAGE = 5  # bytes a row of memory.health.SlotUsage
_WORKSPACES = 2 * 2**25  # cuBLAS on Hopper takes 32 MiB for each of the threads of forward and backward
_FRAGMENTATION = 0.05  # of what a step allocates, on a GPU: the caching allocator's blocks are not all full


@dataclass(frozen=True)
class HostStorage:
    """Bytes of its host's memory that a rank takes because its values lie there; of other tiers nothing is counted."""

    values: int = 0  # of all memories
    checkpoint: int = 0  # the copy that is written in the background: parameters, tables, and all optimizers' state

    @property
    def total(self) -> int:
        return self.values + self.checkpoint


@dataclass(frozen=True)
class Storage:
    """Bytes of one rank's device, by kind."""

    values: int  # of all memories; 0 where they lie in the host's memory
    cache: int  # of such values
    value_state: int  # of their optimizer
    usage: int  # counters of hits
    id_tables: int
    id_state: int
    dense_parameters: int
    dense_gradients: int  # the buckets of DistributedDataParallel, which gradients are views of; on a GPU old and new
    dense_state: int  # AdamW
    batch: int
    activations: int  # at the peak of a step, with what the exchange and the optimizer need then
    margin: int  # fragmentation; 0 on a CPU
    host: HostStorage  # beside all these

    @property
    def allocated(self) -> int:
        """Most bytes of tensors at once."""
        return self.total - self.margin

    @property
    def kinds(self) -> dict[str, int]:
        """By name, without the host's."""
        return {kind.name: getattr(self, kind.name) for kind in fields(self) if kind.name != "host"}

    @property
    def total(self) -> int:
        return sum(self.kinds.values())


def rank_storage(
    config: RunConfig,
    schema: Schema,
    layout: Layout,
    trace: StepTrace,
    tables: Sequence[TableShards] = (),
    distinct: Distinct | None = None,
) -> list[Storage]:
    """What each rank takes at its peak, in the order of the ranks.

    `trace` is that of the busiest rank, with ceil(batch_size / W) rows; `tables` says where the rows of id tables lie,
    and what else it lists is passed over.  `distinct`: see `exchange_bytes`.
    """
    ids = [table for table in tables if table.kind == "ids"]
    rows_W = [memory_rows(config, layout, rank) for rank in (0, layout.world - 1)]
    dense = sum(trace.parameters)
    on_gpu = trace.device_type == "cuda"
    keys = Counter(map(schema.table_of, schema.sparse_keys))  # of a table; each has its sums
    pooled = [table for table in ids if not table.module.endswith("sequence_tables")]
    dims_W = [sum(t.dim * keys[t.table] for t in pooled if t.rows_per_rank[rank]) for rank in range(layout.world)]
    steps = {dims: _step(config, layout, trace, dims, distinct) for dims in set(dims_W)}
    storages = []
    for rank in range(layout.world):
        value_rows, width, state_rows, counted_rows = rows_W[rank == layout.world - 1]
        memories = sum(look_up.kind == "memory" for look_up in trace.look_ups)
        kept, peak = steps[dims_W[rank]]
        activations = kept + peak + (_WORKSPACES if on_gpu else 0)
        row_bytes = width * VALUE_DTYPES[layout.value_dtype].itemsize
        values, on_host = memories * value_rows * row_bytes, layout.tier == "host"
        saved = dict(
            value_state=memories * state_rows * state_bytes(layout.optimizer, width),
            id_tables=sum(t.rows_per_rank[rank] * t.dim * 4 for t in ids),
            id_state=sum(t.rows_per_rank[rank] * 4 for t in ids),
            dense_parameters=dense,
            dense_state=2 * dense + 4 * len(trace.parameters),
        )
        storages.append(
            Storage(
                values=0 if on_host else values,
                cache=memories * cache_bytes(value_rows, row_bytes, config.memory.cache) if on_host else 0,
                usage=memories * counted_rows * _USAGE,
                dense_gradients=(2 if on_gpu else 1) * dense,
                batch=(2 if on_gpu else 1) * trace.batch_bytes,  # a GPU is sent one ahead
                activations=activations,
                margin=int(_FRAGMENTATION * activations) if on_gpu else 0,
                host=HostStorage(values, values + sum(saved.values())) if on_host else HostStorage(),
                **saved,
            )
        )
    return storages


def memory_rows(config: RunConfig, layout: Layout, rank: int) -> tuple[int, int, int, int]:
    """(rows, columns of them, rows with optimizer state, rows whose hits are counted) of one memory on a rank."""
    if config.memory is None:
        return 0, 0, 0, 0
    slots, dim = slots_of(config), config.memory.value_dim or config.model.width
    block = -(-slots // layout.world)
    rows = max(0, min(block, slots - rank * block))
    if layout.world > 1 and layout.strategy == "column":
        return slots, -(-dim // layout.world), slots, rows
    if layout.world > 1 and layout.strategy == "replicated":
        return slots, dim, rows, slots
    return rows, dim, rows, rows


def slots_of(config: RunConfig) -> int:
    """n of one memory."""
    return config.memory.sub_keys**2 * config.memory.parts(config.model.tokens)


def _step(
    config: RunConfig, layout: Layout, trace: StepTrace, id_dims: int, distinct: Distinct | None
) -> tuple[int, int]:
    """(bytes that look-ups keep from step to step, peak of a step beyond them)."""
    held = [_held(config, layout, look_up, id_dims, distinct, trace.device_type) for look_up in trace.look_ups]
    return sum(one.kept for one in held), max(_bytes_at(span, trace.look_ups, held) for span in trace.spans)


def _held(
    config: RunConfig, layout: Layout, look_up: LookUp, id_dims: int, distinct: Distinct | None, device_type: str
) -> ExchangeBytes:
    if look_up.kind == "memory":
        size = slots_of(config), look_up.dim, look_up.bags, look_up.hits
        rest = {"chunks": config.memory.chunks, "distinct": distinct, "device_type": device_type}
        rest |= {"autocast": config.training.precision == "bf16"}
        # two_level holds as much in groups of any size, and is soon run in small ones
        return exchange_bytes(replace(layout, group_ranks=None), *size, **rest)
    return _held_by_ids(layout.world, look_up, id_dims)


def _held_by_ids(world: int, look_up: LookUp, id_dims: int) -> ExchangeBytes:
    """Of TorchRec's embeddings, on a rank that makes sums of so many columns in all, for every row.

    It is an estimate, as TorchRec's buffers are many and small: what it looks up leaves by an all-to-all, of which both
    sides are there at once; ids travel in 8 bytes and are kept until the next step.  Whole tables are looked up for the
    rows of all ranks; those read as sequences are cut by rows, and a rank has its share of the events of all.
    """
    output = 4 * look_up.bags * look_up.dim
    kept = round(8 * look_up.bags * (look_up.hits + 1))
    if world == 1:
        return ExchangeBytes(kept, 0, False, 2 * output, output)
    looked_up = 4 * look_up.bags * (world * id_dims if look_up.kind == "ids" else look_up.dim)
    return ExchangeBytes(kept, kept, False, 2 * looked_up + output, 2 * looked_up)


def _bytes_at(span: Span, look_ups: Sequence[LookUp], held: Sequence[ExchangeBytes]) -> int:
    total = span.live
    saving = set(span.held)
    if span.look_up is not None:
        under_way = held[span.look_up]
        total += under_way.forward if span.phase == "forward" else under_way.backward
        if span.phase == "backward":
            saving.add(span.look_up)
    total += sum(held[number].saved for number in saving)
    for number in span.outputs:
        if not (held[number].keeps_output and number in saving):
            total += look_ups[number].output_bytes
    return total
