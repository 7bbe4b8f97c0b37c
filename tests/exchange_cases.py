"""What a look-up of a sharded memory holds, counted, for test_storage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from tensor_bytes import mark, settled_messages, tensor_bytes

from msn_dist.memory.values import VALUE_DTYPES, MemoryValues, ValueSharding
from msn_dist.sharding import ValueOptimizer
from msn_dist.sharding.sharded_values import ShardedMemoryValues
from msn_dist.sharding.strategies import shard_values


@dataclass(frozen=True)
class LookUpCase:
    strategy: str = "row_pooled"
    wire: str = "fp32"
    value_dtype: str = "fp32"
    lookup: str = "fbgemm"
    slots: int = 64**2
    bags: int = 2048
    hits: int = 8
    dim: int = 64
    ranks_per_node: int = 1
    chunks: int = 1
    optimizer: str = "rowwise_adagrad"
    popular: int | None = None  # slots that hits fall on; None: all

    def __str__(self) -> str:
        popular = "" if self.popular is None else f" {self.popular} popular"
        return f"{self.strategy} {self.wire} {self.optimizer} {self.chunks}{popular}"


def counted(rank: int, world: int, cases: list[LookUpCase]) -> list[dict[str, int]]:
    """Of each case: bytes that a look-up saves for its backward, and what both directions need besides."""
    return [_counted(case) for case in cases]


def _counted(case: LookUpCase) -> dict[str, int]:
    sharding = ValueSharding(case.strategy, case.wire, case.lookup)
    table = MemoryValues(
        case.slots,
        case.dim,
        init_std=1.0,
        seed=0,
        dtype=VALUE_DTYPES[case.value_dtype],
        sharding=sharding,
        device="meta",
    )
    optimizer = ValueOptimizer(kind=case.optimizer)
    values = shard_values(table, dist.group.WORLD, optimizer, torch.device("cpu"), case.ranks_per_node)
    _look_up(values, case)
    return _look_up(values, case)


def _look_up(values: ShardedMemoryValues, case: LookUpCase) -> dict[str, int]:
    shape, output_bytes = (case.bags, case.hits), 4 * case.bags * case.dim
    with settled_messages(), tensor_bytes() as found:
        of_rank = torch.Generator().manual_seed(values.exchange.rank)
        slots_ML = torch.randint(case.popular or case.slots, shape, generator=of_rank)
        weights_ML = torch.rand(shape, requires_grad=True) * 1
        with mark("forward"):
            if case.chunks == 1:
                pooled = [values(slots_ML, weights_ML)]
            else:
                parts = slots_ML.tensor_split(case.chunks), weights_ML.tensor_split(case.chunks)
                pooled = values.pooled_in_chunks(zip(*parts, strict=True))
        with mark("with output"):
            doubled_MD = torch.cat(pooled) * 2  # saves nothing for its backward
        del pooled
        gradient_MD = torch.ones_like(doubled_MD)
        with mark("backward"):
            doubled_MD.backward(gradient_MD)
    base = found.live("forward")
    with_output = found.live("with output") - base
    without = found.live("backward") - base - 2 * output_bytes
    return {
        "saved": without,  # and kept, as this is counted from nothing
        "output": with_output - without,  # what ends with the output: its bytes, or 0 where the look-up keeps them
        "forward": found.peak("forward") - base,
        "backward": found.peak("backward") - base - without - 3 * output_bytes,  # the gradient is a third such tensor
    }
