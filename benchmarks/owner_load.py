"""python -m benchmarks.owner_load: how evenly a placement spreads skewed hits over owners.  Runs for seconds.

W = 8 owners of blocks of n / W rows, n = 2^20 slots (N = 1,024 sub-keys an axis), popularity of sub-keys p by Zipf's
law with exponent 1.2.  Kinds of hits:

    one axis     I by Zipf, J uniform                          exact shares, no sampling
    both axes    I and J by Zipf, every hit drawn alone        exact shares
    top k        k = 32 distinct slots a query, the best sums of log p_I and log p_J with Gumbel noise, retrieved as
                 product keys do                               2^15 queries
    top k, once  the same, but each of 8 ranks with 2^12 of the queries asks for a row once, as row_gather_unique does

and for each the sub-keys renamed at random, 20 times, and in the order of popularity, so that neighbours are hot.

Placements that do not know the use: `contiguous` blocks of slots; `affine`, the product's; `hashed`, a random
permutation, as good as any Feistel network; `diagonal`, slot (I, J) to owner (I + J) mod W, which gives every owner the
same number of slots of every sub-key of either axis.  With knowledge of it: `affine, h dealt` gives each of the h most
used slots, in that order, to the owner with the least load so far (they swap rows with unused ones).

A slot with a share s of all hits has one owner, whose load over the mean is W * s at least: `bound`.  At least as
telling is `expected spread`: random owners have a standard deviation of sqrt((W - 1) * sum of s^2) over the mean.

Writes benchmarks/results/owner_load.csv.
Shape suffixes: N sub-keys of an axis, n slots, W owners, M queries, K slots of a query.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import statistics
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import write_rows
from msn_dist.kernels import reference
from msn_dist.memory.placement import Placement
from msn_dist.planner.load import zipf
from msn_dist.sharding.row_sharded import shard_of

WORLD, SUB_KEYS, TOP_K, EXPONENT, TARGET = 8, 1024, 32, 1.2, 1.15
SLOTS = SUB_KEYS**2
RENAMINGS, QUERIES, DEALT = 20, 2**15, (8, 32)


def main() -> None:
    owner_n = owners()
    placements = [(name, owner_n[name], 0) for name in owner_n]
    placements += [(f"affine, {dealt} dealt", owner_n["affine"], dealt) for dealt in DEALT]
    rows = []
    for hits, use_NN in use_of_slots().items():
        orders = {"renamed": [renamed(use_NN, seed) for seed in range(RENAMINGS)], "by popularity": [use_NN]}
        for (order, cases), (placement, owners_n, dealt) in itertools.product(orders.items(), placements):
            loads = [load(case_NN, owners_n, dealt) for case_NN in cases]
            rows.append(_row(hits, order, placement, loads, use_NN))
    with contextlib.redirect_stdout(None):  # the table below says the same in fewer columns
        path = write_rows("owner_load.csv", rows)
    print(_table(rows))
    print(f"written to {path}")


def use_of_slots() -> dict[str, Tensor]:
    """Share of all hits on each slot [N, N], float64, sub-keys in the order of popularity."""
    popular_N = zipf(SUB_KEYS, EXPONENT)
    return {
        "one axis": popular_N[:, None].expand(-1, SUB_KEYS) / SUB_KEYS,
        "both axes": popular_N[:, None] * popular_N,
        **_top_k_use(popular_N.to(torch.float32)),
    }


def _top_k_use(popular_N: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hits_n, once_n = torch.zeros(2, SLOTS, dtype=torch.int64)
    for _ in range(WORLD):
        hits_of_rank_n = torch.zeros(SLOTS, dtype=torch.int64)
        for _ in range(QUERIES // WORLD // 1024):
            gumbel_2MN = -torch.empty(2, 1024, SUB_KEYS).exponential_(generator=generator).log()
            _, slots_MK = reference.product_key_topk(*(popular_N.log() + gumbel_2MN), TOP_K)
            hits_of_rank_n += torch.bincount(slots_MK.flatten(), minlength=SLOTS)
        hits_n += hits_of_rank_n
        once_n += hits_of_rank_n > 0
    uses = {"top k": hits_n, "top k, once": once_n}
    return {name: (use_n / use_n.sum().double()).view(SUB_KEYS, SUB_KEYS) for name, use_n in uses.items()}


def owners() -> dict[str, Tensor]:
    """Owner of each slot [n] under the placements that do not know the use."""
    slots_n = torch.arange(SLOTS)
    block, *_ = shard_of(SLOTS, WORLD, 0)
    hashed_n = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(0))
    return {
        "contiguous": Placement(SLOTS).row_of(slots_n) // block,
        "affine": Placement.permuted(SLOTS).row_of(slots_n) // block,
        "hashed": hashed_n // block,
        "diagonal": (slots_n // SUB_KEYS + slots_n % SUB_KEYS) % WORLD,
    }


def renamed(use_NN: Tensor, seed: int) -> Tensor:
    """The same use with other names for the sub-keys of both axes."""
    generator = torch.Generator().manual_seed(seed)
    i_N, j_N = (torch.randperm(SUB_KEYS, generator=generator) for _ in range(2))
    return use_NN[i_N][:, j_N]


def load(use_NN: Tensor, owner_n: Tensor, dealt: int = 0) -> float:
    """Hits on the busiest owner over the mean, with the `dealt` most used slots moved to the least loaded owners."""
    use_n = use_NN.flatten()
    top, top_at = use_n.topk(dealt)
    loads = torch.bincount(owner_n, weights=use_n.index_fill(0, top_at, 0), minlength=WORLD).tolist()
    heapq.heapify(loads)
    for share in top.tolist():
        heapq.heapreplace(loads, loads[0] + share)
    return max(loads) * WORLD


def _row(hits: str, order: str, placement: str, loads: list[float], use_NN: Tensor) -> dict[str, Any]:
    return {
        "hits": hits,
        "sub_keys": order,
        "placement": placement,
        "mean_load": statistics.mean(loads),
        "worst_load": max(loads),
        "within_target": sum(load <= TARGET for load in loads) / len(loads),
        "bound": max(1.0, WORLD * float(use_NN.max())),
        "expected_spread": math.sqrt((WORLD - 1) * float(use_NN.square().sum())),
        "largest_share": float(use_NN.max()),
        "cases": len(loads),
        "ranks": WORLD,
        "n": SLOTS,
        "top_k": TOP_K,
        "zipf": EXPONENT,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    """Owner load max/mean: mean and worst over the renamings, and for sub-keys by popularity."""
    columns = f"{'renamed: mean':>14} {'worst':>6} {f'within {TARGET}':>12} {'by popularity':>14}"
    lines = [f"{'hits':12} {'placement':16} {columns}"]
    for row in rows:
        if row["sub_keys"] == "renamed":
            same = ("hits", "placement")
            other = next(o for o in rows if o["sub_keys"] != "renamed" and all(o[key] == row[key] for key in same))
            lines.append(
                f"{row['hits']:12} {row['placement']:16} {row['mean_load']:14.3f} {row['worst_load']:6.3f} "
                f"{row['within_target']:12.0%} {other['mean_load']:14.3f}"
            )
    for hits, share, bound, spread in dict.fromkeys(
        (row["hits"], row["largest_share"], row["bound"], row["expected_spread"]) for row in rows
    ):
        lines.append(
            f"{hits}: the most used slot has {share:.2%} of the hits, so {bound:.3f} at least; "
            f"spread of random owners {spread:.3f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
