"""python -m benchmarks.memory_layer: one memory layer on CPU against the same layer written naively.

The peer is what the formulas say, line by line: top-k over all k * k pairs, a gather of every value,
a weighted sum, and a dense gradient of the table.  Both start from the same parameters; outputs and gradients are
compared before anything is timed.  Writes benchmarks/results/memory_layer.csv.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from benchmarks.results import write_rows
from msn_dist.config import MemoryConfig
from msn_dist.memory import Memory
from msn_dist.planner import make_plan
from msn_dist.sharding import MemoryValuesSharder, ValueOptimizer


class NaiveMemory(nn.Module):
    """The peer; shares its parameters with a `Memory`."""

    def __init__(self, memory: Memory, top_k: int) -> None:
        super().__init__()
        self.memory, self.top_k = memory, top_k

    def forward(self, x_BTD: Tensor) -> Tensor:
        keys, k = self.memory.keys, self.top_k
        (row_BTHK, i_BTHK), (col_BTHK, j_BTHK) = (scores_BTHN.topk(k) for scores_BTHN in keys.scores(x_BTD))
        pairs_BTHP = (row_BTHK[..., :, None] + col_BTHK[..., None, :]).flatten(3)
        slots_BTHP = (i_BTHK[..., :, None] * keys.codes_AHNE.shape[2] + j_BTHK[..., None, :]).flatten(3)
        best_BTHK, chosen_BTHK = pairs_BTHP.topk(k)
        slots_BTHK = slots_BTHP.gather(3, chosen_BTHK)
        table = self.memory.values
        values_BTHKD = table.weight[table.placement.row_of(slots_BTHK)]
        pooled_BTD = (best_BTHK.softmax(-1)[..., None] * values_BTHKD).sum((2, 3))
        return self.memory.gate(x_BTD, pooled_BTD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    tokens, width = 8, 64
    config = MemoryConfig(sub_keys=256, top_k=32, key_dim=32)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    torch.manual_seed(0)
    naive = NaiveMemory(Memory(config, tokens, width, seed=0), config.top_k)
    torch.manual_seed(0)
    to_shard = Memory(config, tokens, width, seed=0, device="meta")
    sharders = [MemoryValuesSharder(ValueOptimizer(learning_rate=0.0))]
    plan = make_plan(to_shard, sharders, 1, 1, "cpu").sharding
    ours = DistributedModelParallel(to_shard, plan=plan, sharders=sharders)

    x_BTD = torch.randn(arguments.rows, tokens, width)
    upstream_BTD = torch.randn_like(x_BTD)
    found, expected = _step(ours, x_BTD, upstream_BTD), _step(naive, x_BTD, upstream_BTD)
    for name, one, other in zip(("output", "gradient of x", "gradient of the queries"), found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")

    # in turns, so that a slow moment of the machine hits both
    times = {"msn_dist": [], "naive": []}
    for _ in range(arguments.repeats):
        for name, model in (("msn_dist", ours), ("naive", naive)):
            times[name].append(_seconds(lambda model=model: _step(model, x_BTD, upstream_BTD)))
    rows = [
        {
            "benchmark": "memory_layer forward+backward",
            "provider": name,
            "shape": f"B={arguments.rows} T={tokens} N={config.sub_keys} k={config.top_k} D={width}",
            "p20_ms": _quantile(seconds, 0.2),
            "p50_ms": _quantile(seconds, 0.5),
            "p80_ms": _quantile(seconds, 0.8),
        }
        for name, seconds in times.items()
    ]
    write_rows("memory_layer.csv", rows)
    ratio = rows[1]["p50_ms"] / rows[0]["p50_ms"]
    print(f"{ratio:.2f} times as fast as the naive layer (its table has a dense gradient and no optimizer step;")
    print("ours includes the row-wise Adagrad update)")
    dist.barrier()
    del ours
    dist.destroy_process_group()


def _step(model: nn.Module, x_BTD: Tensor, upstream_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x_BTD = x_BTD.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    out_BTD = model(x_BTD)
    out_BTD.backward(upstream_BTD)
    queries = next(p for name, p in model.named_parameters() if name.endswith("keys.query_XD"))
    return out_BTD.detach(), x_BTD.grad, queries.grad


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _quantile(seconds: list[float], q: float) -> float:
    return 1e3 * float(torch.tensor(seconds).quantile(q))


if __name__ == "__main__":
    main()
