"""Counts first, or padded capacity?  What it costs to tell the receivers how many hits come, and what padding costs.

Sending counts ahead takes one small all-to-all and a wait of the host.  The other way is messages of a fixed capacity
for every pair of ranks: c times the mean number of hits, m L / W.  They travel padded, there (a row and a weight) and
back (the gradient of the weight; with row_gather the rows themselves both ways), and a step in which some pair has more
hits needs an exact fallback.  gloo's host waits anyway; on a GPU the wait drains the stream, which is not seen here.

How often that is so, and what capacity is enough in 99.9 % of steps, follows from the slots: a rank's hits on an owner
are a sum over many independent samples of 8 bags, so normal, with the mean and variance of those; the W * W pairs are
taken as independent.  It holds for hits that stay as they are: sub-keys that become popular in training change it.

Shape suffixes: W ranks, M bags, L hits a bag.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from msn_dist.memory.placement import Placement
from msn_dist.sharding.exchange import Exchange
from msn_dist.sharding.row_sharded import shard_of

CAPACITY, STEPS = 1.25, 0.999
_TOGETHER = 8  # bags of one sample


def seconds_of_counts(group: dist.ProcessGroup, repeats: int) -> Tensor:
    """Seconds of the counts' exchange and the wait for them, of the slowest rank; a collective call."""
    exchange = Exchange(group, torch.device("cpu"))
    counts_W2 = torch.ones(exchange.world, 2, dtype=torch.int64)
    seconds = torch.zeros(repeats, dtype=torch.float64)
    for repeat in range(repeats):
        dist.barrier(group)
        start = time.perf_counter()
        exchange.swap_counts(counts_W2).wait().tolist()
        seconds[repeat] = time.perf_counter() - start
    dist.all_reduce(seconds, dist.ReduceOp.MAX, group=group)
    return seconds


@dataclass(frozen=True)
class Fullness:
    """Hits of one rank on each owner, over the mean of all owners."""

    mean_W: Tensor
    deviation_W: Tensor

    @staticmethod
    def of(slots: int, slots_ML: Tensor, bags: int, world: int) -> Fullness:
        """For `bags` bags a rank, from the bags of several."""
        block, *_ = shard_of(slots, world, 0)
        owner_ML = Placement.permuted(slots).row_of(slots_ML.to(torch.int64)) // block
        hits_MW = torch.zeros(len(owner_ML), world)
        hits_MW.scatter_add_(1, owner_ML, torch.ones_like(owner_ML, dtype=torch.float32))
        samples, of_samples = bags / _TOGETHER, hits_MW.unflatten(0, (-1, _TOGETHER)).sum(1).double()
        mean_of_pair = bags * slots_ML.shape[1] / world
        return Fullness(of_samples.mean(0) * samples / mean_of_pair, of_samples.std(0) * samples**0.5 / mean_of_pair)

    def steps_over(self, capacity: float) -> float:
        """Share of the steps in which some rank has more hits on some owner."""
        fits_W = torch.special.log_ndtr((capacity - self.mean_W) / self.deviation_W)
        return abs(float(torch.expm1(len(fits_W) * fits_W.sum())))

    def enough(self) -> float:
        """The capacity that holds all hits in a share of STEPS."""
        too_small, enough = 1.0, 2.0
        while self.steps_over(enough) > 1 - STEPS:
            enough *= 2
        while enough - too_small > 1e-4:
            middle = (too_small + enough) / 2
            too_small, enough = (too_small, middle) if self.steps_over(middle) <= 1 - STEPS else (middle, enough)
        return enough


def padding_bytes(world: int, hits: int, dim: int, capacity: float) -> tuple[float, float]:
    """Bytes that a rank sends more than without padding, with row_pooled and with row_gather; `hits` are a rank's."""
    rows = (capacity - 1) * hits * (world - 1) / world
    return rows * 12, rows * (4 + 8 * dim)
