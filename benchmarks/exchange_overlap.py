"""How much of the exchange a memory hides if the batch is cut into chunks, and whether that makes a step faster.

A whole memory layer under DistributedModelParallel: while the messages of a chunk travel, the next chunk is retrieved.
On one rank nothing travels, so W = 1 shows what the chunks cost by themselves.

Shape suffixes: B samples, T tokens, D width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv

from msn_dist.config import MemoryConfig
from msn_dist.memory import Memory
from msn_dist.planner import make_plan
from msn_dist.sharding import MemoryValuesSharder, ValueOptimizer

TOKENS, WIDTH = 8, 64


def seconds_and_hidden(
    group: dist.ProcessGroup, rows: int, chunks: Sequence[int], repeats: int
) -> dict[int, tuple[Tensor, float]]:
    """{chunks: (seconds of the slowest rank in each step, share of the messages' time that is hidden)}.

    The share is NaN on one rank.  `rows` are a rank's samples, B.  RuntimeError if chunks change the result.
    A collective call.
    """
    layers = {count: _memory_layer(group, count) for count in chunks}
    generator = torch.Generator().manual_seed(group.rank())
    x_BTD = torch.randn(rows, TOKENS, WIDTH, generator=generator)
    upstream_BTD = torch.randn(rows, TOKENS, WIDTH, generator=generator)
    expected = None
    for count, layer in layers.items():
        found = _step(layer, x_BTD, upstream_BTD)
        expected = expected or found
        for one, other in zip(found, expected, strict=True):
            if not torch.allclose(one, other, rtol=1e-3, atol=1e-4):
                raise RuntimeError(f"{count} chunks give another result, by up to {float((one - other).abs().max())}")
        layer.module.values.exchange.overlap.read()
    seconds = {count: torch.zeros(repeats, dtype=torch.float64) for count in chunks}
    for repeat in range(repeats):
        for count, layer in layers.items():
            dist.barrier(group)
            start = time.perf_counter()
            _step(layer, x_BTD, upstream_BTD)
            seconds[count][repeat] = time.perf_counter() - start
    results = {}
    for count, layer in layers.items():
        under_way_and_waited = torch.tensor(layer.module.values.exchange.overlap.read())
        dist.all_reduce(under_way_and_waited, group=group)
        dist.all_reduce(seconds[count], dist.ReduceOp.MAX, group=group)
        under_way, waited = under_way_and_waited.tolist()
        results[count] = seconds[count], 1 - waited / under_way if under_way else math.nan
    return results


def _memory_layer(group: dist.ProcessGroup, chunks: int) -> DistributedModelParallel:
    torch.manual_seed(0)
    config = MemoryConfig(sub_keys=256, top_k=32, key_dim=32, chunks=chunks)
    memory = Memory(config, TOKENS, WIDTH, seed=0, device="meta")
    sharders = [MemoryValuesSharder(ValueOptimizer(learning_rate=0.0))]
    plan = make_plan(memory, sharders, group.size(), group.size(), "cpu").sharding
    env = ShardingEnv.from_process_group(group)
    return DistributedModelParallel(memory, env=env, device=torch.device("cpu"), plan=plan, sharders=sharders)


def _step(layer: DistributedModelParallel, x_BTD: Tensor, upstream_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """(output, gradient of x)"""
    x_BTD = x_BTD.clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    out_BTD = layer(x_BTD)
    out_BTD.backward(upstream_BTD)
    return out_BTD.detach(), x_BTD.grad
