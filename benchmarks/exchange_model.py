"""What the strategies are expected to send at any W, and from which W on one of them is ahead of another.

Every rank has m bags of L distinct slots out of n; owners hold n / W rows each.  Bytes of a rank follow from three
expected numbers, which `Load` holds:

    hits that leave the rank     m L (W - 1) / W, with any skew that the placement evens out
    owners that a bag hits       E(W); so m E(W) (W - 1) / W pairs of a bag and another rank
    rows that R ranks hit        U(R); so U(1) (W - 1) / W distinct rows that a rank asks others for

For uniform slots an owner has none of a bag's hits with probability (1 - 1 / W)^L, hence E = W (1 - (1 - 1 / W)^L) and
m (W - 1) (1 - (1 - 1 / W)^L) pairs; a bag reads a given slot with probability L / n, so of R m bags none does with
probability (1 - L / n)^(R m), hence U(R) = n (1 - (1 - L / n)^(R m)).  (Hits are drawn without replacement, which makes
the pairs more by a share of L^2 / 2 n at most.)  For other skews E and U are counted in slots of a benchmark.

No time is predicted: times of ranks that share a machine do not tell what a byte costs (fits to them do not repeat).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from msn_dist.memory.placement import Placement
from msn_dist.sharding.hit_wire import weight_dtype
from msn_dist.sharding.row_sharded import shard_of
from msn_dist.sharding.wire import row_bytes

WORLDS = [2**power for power in range(1, 13)]  # 2 to 4,096
Quantiles = tuple[float, float, float]  # p20, p50, p80
COMPARED = [
    ("row_pooled", "row_gather"),
    ("row_pooled", "row_gather_unique"),
    ("row_pooled", "row_pooled_sparse"),
    ("row_pooled_sparse", "row_gather_unique"),
]


@dataclass(frozen=True)
class Load:
    """The hits of one rank, as far as bytes depend on them."""

    slots: int  # n
    bags: int  # m
    hits: int  # L
    owners_of_bag: Callable[[int], float]  # E by W
    rows: Callable[[int], float]  # U by R

    @staticmethod
    def uniform(slots: int, bags: int, hits: int) -> Load:
        return Load(
            slots,
            bags,
            hits,
            lambda world: world * (1 - (1 - 1 / world) ** hits),
            lambda ranks: slots * -math.expm1(ranks * bags * math.log1p(-hits / slots)),
        )

    @staticmethod
    def counted(slots: int, slots_ML: Tensor, bags: int) -> Load:
        """From bags of several ranks, `bags` a rank; U for so many ranks only."""
        row_ML = Placement.permuted(slots).row_of(slots_ML.to(torch.int64))

        @cache
        def owners_of_bag(world: int) -> float:
            ordered_ML = (row_ML // shard_of(slots, world, 0)[0]).sort(dim=1).values
            return 1 + float((ordered_ML.diff(dim=1) != 0).sum()) / len(ordered_ML)

        @cache
        def rows(ranks: int) -> float:
            parts = row_ML[: len(row_ML) // (ranks * bags) * ranks * bags].view(-1, ranks * bags, row_ML.shape[1])
            return sum(len(part.unique()) for part in parts) / len(parts)

        return Load(slots, bags, row_ML.shape[1], owners_of_bag, rows)


def expected_bytes(strategy: str, world: int, load: Load, dim: int, wire: str = "fp32") -> float:
    """Bytes that a rank sends in a forward and backward, rows in int32."""
    away = (world - 1) / world
    hit, value = 4 + weight_dtype(wire).itemsize, row_bytes(wire, dim)
    bags_to_others = (world - 1) * load.bags
    match strategy:
        case "row_pooled" | "two_level":  # two levels send as much, but less of it between nodes
            lengths = bags_to_others * (1 if load.hits < 256 else 4)
            hits = load.bags * load.hits * away * (hit + 4)
            return 16 * (world - 1) + lengths + hits + 2 * bags_to_others * value
        case "row_pooled_sparse":
            hits = load.bags * load.hits * away * (hit + 4)
            return 16 * (world - 1) + hits + 2 * load.bags * load.owners_of_bag(world) * away * value
        case "row_gather" | "row_gather_unique":
            rows = load.bags * load.hits if strategy == "row_gather" else load.rows(1)
            return 8 * (world - 1) + rows * away * (4 + 2 * value)
        case "column":
            value = row_bytes(wire, -(-dim // world))
            hits = bags_to_others * load.hits * (hit + 4)
            return 8 * (world - 1) + hits + 2 * bags_to_others * value + 8 * load.rows(world) * away
        case "replicated":
            return load.slots * away * (value + 4 * dim)
    raise ValueError(f"unknown strategy {strategy!r}")


def crossing(worlds: Sequence[int], first: Sequence[float], second: Sequence[float]) -> float:
    """W from which on `second` costs less than `first`, linear between two of `worlds`; infinite if never."""
    gains = [one - other for one, other in zip(first, second, strict=True)]
    behind = max((at for at, gain in enumerate(gains) if gain <= 0), default=None)
    if behind is None:
        return worlds[0]
    if behind == len(worlds) - 1:
        return math.inf
    share = gains[behind] / (gains[behind] - gains[behind + 1])
    return worlds[behind] + (worlds[behind + 1] - worlds[behind]) * share


def clear_crossing(worlds: Sequence[int], first: Sequence[Quantiles], second: Sequence[Quantiles]) -> float:
    """The first of `worlds` from which on `second` is clearly ahead: its p80 is below the p20 of `first`.

    Infinite if at their end `first` is as clearly ahead, NaN if neither is.
    """
    ahead = [other[2] < one[0] for one, other in zip(first, second, strict=True)]
    if not ahead[-1]:
        return math.inf if first[-1][2] < second[-1][0] else math.nan
    return worlds[max((at + 1 for at, yes in enumerate(ahead) if not yes), default=0)]
