"""From which W on one strategy is ahead of another, by bytes and by time.

No time is predicted: times of ranks that share a machine do not tell what a byte costs (fits to them do not repeat).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

WORLDS = [2**power for power in range(1, 13)]  # 2 to 4,096
Quantiles = tuple[float, float, float]  # p20, p50, p80
COMPARED = [
    ("row_pooled", "row_gather"),
    ("row_pooled", "row_gather_unique"),
    ("row_pooled", "row_pooled_sparse"),
    ("row_pooled_sparse", "row_gather_unique"),
]


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
