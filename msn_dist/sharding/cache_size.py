"""How many rows a cache on the GPU has room for (`cached_lookup`)."""

from __future__ import annotations

WAYS = 32  # places of a set: FBGEMM's cache on NVIDIA GPUs
_MOST = 2**31 // WAYS - 1  # sets; FBGEMM counts places in 32 bits


def cache_sets(rows: int, share: float) -> int:
    """Sets of a cache for this share of so many rows, one at least; as FBGEMM counts them."""
    return min(max(1, -(-int(rows * share) // WAYS)), _MOST)
