"""python -m benchmarks.against_torchrec: a row-sharded weighted look-up, ours against TorchRec's own row-wise path.

The peer is `benchmarks.torchrec_path`: TorchRec's KJT exchange, TBE and reduce-scatter, and the gradient of the
weights that it lacks.  Forward, backward and the row-wise Adagrad update, on 2 and 4 gloo ranks of this machine, the
same uniform slots for both, in turns; the slowest rank of each step counts.  Output, gradient of the weights and
updated rows are compared first.  Ranks share the cores, so time is work: no network is in it.

Writes benchmarks/results/against_torchrec.csv.  Shape suffixes: M bags of a rank, L hits a bag.
"""

from __future__ import annotations

import gc
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

from msn_dist.training.quiet import quiet_libraries

quiet_libraries()  # before torchrec is imported below

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from torch import nn  # noqa: E402
from torchrec.distributed.model_parallel import DistributedModelParallel  # noqa: E402
from torchrec.distributed.types import ShardingEnv  # noqa: E402

from benchmarks.results import write_rows  # noqa: E402
from benchmarks.torchrec_path import TorchRecValues, TorchRecValuesSharder  # noqa: E402
from msn_dist.memory.values import MemoryValues  # noqa: E402
from msn_dist.planner import make_plan  # noqa: E402
from msn_dist.sharding import MemoryValuesSharder, ValueOptimizer  # noqa: E402

SLOTS, HITS_OF_RANK, STEPS = 2**16, 2**17, 11
SHAPES = [(8, 64), (32, 16), (32, 64), (128, 64)]  # (L, D)


def main() -> None:
    rows = [row for world in (2, 4) for row in _on_ranks(world)]
    write_rows("against_torchrec.csv", rows)
    for ours, peer in zip(rows[::2], rows[1::2], strict=True):
        ratio = peer["p50_ms"] / ours["p50_ms"]
        print(f"W = {ours['ranks']}, L = {ours['hits']}, D = {ours['dim']}: {ratio:.2f} times as fast")


def _on_ranks(world: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
        probe.close()
        mp.spawn(_rank, (world, port, folder), nprocs=world)
        return torch.load(Path(folder, "rows"))


def _rank(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=world)
    rows = [row for hits, dim in SHAPES for row in _measure(hits, dim, rank, world)]
    if rank == 0:
        torch.save(rows, Path(folder, "rows"))
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()


def _measure(hits: int, dim: int, rank: int, world: int) -> list[dict[str, Any]]:
    optimizer = ValueOptimizer()
    tables = nn.ModuleDict(
        {
            "msn_dist": MemoryValues(SLOTS, dim, init_std=0.5, seed=7, device="meta"),
            "torchrec": TorchRecValues(SLOTS, dim),
        }
    )
    sharders = [MemoryValuesSharder(optimizer), TorchRecValuesSharder(optimizer)]
    plan = make_plan(tables, sharders[:1], world, world, "cpu").sharding
    plan.plan["torchrec"] = sharders[1].plan(tables["torchrec"], world)
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    model = DistributedModelParallel(tables, env, torch.device("cpu"), plan, sharders).module
    ours, torchrec = model["msn_dist"], model["torchrec"]
    torchrec.weight_RD.copy_(ours.weight)
    generator = torch.Generator().manual_seed(rank)
    slots_ML = torch.randint(SLOTS, (HITS_OF_RANK // hits, hits), generator=generator)
    # our placement is a part of our work, but what TorchRec gets are rows, so that both hit the same ones
    inputs = {"msn_dist": slots_ML, "torchrec": ours.placement.row_of(slots_ML)}
    seconds, results = {name: [] for name in inputs}, {}
    for step in range(STEPS + 1):
        weights_ML = torch.rand(slots_ML.shape, generator=generator)
        for name, ids_ML in inputs.items():
            leaf_ML = weights_ML.clone().requires_grad_()
            dist.barrier()
            start = time.perf_counter()
            pooled_MD = model[name](ids_ML, leaf_ML)
            pooled_MD.backward(torch.ones_like(pooled_MD))
            taken = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            seconds[name].append(float(taken))
            results[name] = pooled_MD.detach(), leaf_ML.grad
        if step == 0:  # which is not timed
            torch.testing.assert_close(results["msn_dist"], results["torchrec"], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours.weight.data, torchrec.weight_RD, rtol=1e-4, atol=1e-4)
    return [
        {
            "provider": name,
            "ranks": world,
            "hits": hits,
            "dim": dim,
            "bags": len(slots_ML),
            "n": SLOTS,
            **{f"p{q}_ms": 1e3 * float(torch.tensor(times[1:]).quantile(q / 100)) for q in (20, 50, 80)},
        }
        for name, times in seconds.items()
    ]


if __name__ == "__main__":
    main()
