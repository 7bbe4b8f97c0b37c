"""Values in the host's memory: what their cache on the GPU takes, and what crosses the host's link in a step.

The cache is that of `sharding.cached_lookup`: C places, of which each step takes one for every distinct row that it
hits, as long as there are any; the least recently hit rows make room.  With p the probability that a step of all ranks
hits a row (`load`), a row is cached if one of the last T steps has hit it, where T is the time in which C W rows are
hit (Che, Tung and Wang 2002; W owners have C places each):

    sum over rows of 1 - (1 - p)^T = C W        missed rows of a step: sum of p (1 - p)^T

For rows that are hit alike that is the share C W / n of them, whatever T; T below 1 stands for a cache that is smaller
than what one step hits.  Of the rows that an owner misses in a step at most C find a place:

    placed rows    come once, before the look-up, and as many go back, stepped or not
    the others     are read in the host's memory: h times in the look-up, h times for the gradient of their weights, if
                   they have any there, and once for their step, where h is the hits of a row; and go back once

32 rows share a set, so that some find no place a little before C are there; that is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from msn_dist.planner.load import Load
from msn_dist.sharding.cache_size import WAYS, cache_sets


def cache_bytes(rows: int, row_bytes: int, share: float) -> int:
    """Of device memory: C places of a row, and 8 bytes each for which row and for when; 4 bytes for each of the rows.

    They are FBGEMM's lxu_cache_weights, lxu_cache_state, lxu_state and cache_index_table_map.
    """
    return WAYS * cache_sets(rows, share) * (row_bytes + 16) + 4 * rows


@dataclass(frozen=True)
class CacheStep:
    """One look-up and its update on one owner; numbers of rows."""

    hits: float
    rows: float  # distinct ones
    missed: float  # of them
    places: int  # C
    weighted: bool  # hits have weights

    @classmethod
    def of(cls, load: Load, world: int, hits: float, share: float, weighted: bool) -> CacheStep:
        """Of one of `world` owners, which looks up so many hits, with a cache for this share of its rows."""
        places = WAYS * cache_sets(-(-load.slots // world), share)
        rows, missed = load.rows(world) / world, load.missed_rows(world, world * places) / world
        return cls(hits, rows, missed, places, weighted)

    @property
    def _placed(self) -> float:
        return min(self.missed, self.places)

    @property
    def arriving(self) -> float:
        """Rows that come from the host."""
        without = self.missed - self._placed
        return self._placed + without * ((1 + self.weighted) * self.hits / self.rows + 1)

    @property
    def leaving(self) -> float:
        """Rows that go back: those that make room, and those that had no place."""
        return self.missed

    def passes(self) -> list[float]:
        """Bytes of each pass over device memory in the look-up, beside the rows themselves.

        Hits become int64, are compared with the tags of their set, once as distinct rows and once as hits, and get
        their place.
        """
        tags = 8 * WAYS
        return [12 * self.hits, (8 + tags) * self.rows, (12 + tags) * self.hits]
