"""The look-up of rows in the host's memory, by FBGEMM, with a cache of them on the GPU.

The rows lie in pinned host memory, which the GPU reads and writes over its link; managed memory, in which small tables
lie, could hang a GPU with less of its own.  Before a look-up, the rows it hits that are not cached come into the cache,
and the least recently used ones go back to make room.  The cache is set-associative: a row may lie in any of the 32
places of one set, and where a step hits more rows of a set, the others are read and stepped in the host's memory.
Nothing else changes: a row is stepped where it lies, with the same arithmetic.

On the GPU lie the state of the optimizer (FBGEMM keeps what is one number a row there), the cache, 16 bytes for each of
its places (which row, and when it was last used), and for every row of the table 4 bytes that say of which table it is.

Shape suffixes: R rows on this rank, D value width, G bags, H hits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from fbgemm_gpu import split_table_batched_embeddings_ops_training as tbe_training
from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheState, EmbeddingLocation
from torch import Tensor

from msn_dist.sharding.cache_size import cache_sets
from msn_dist.sharding.fbgemm_lookup import FbgemmLookup
from msn_dist.sharding.value_optimizer import ValueOptimizer

if TYPE_CHECKING:
    from msn_dist.sharding.hits import Hits

_PINNED_FROM = 2**26  # bytes; blocks of less than half may share a page, which CUDA does not pin twice


class CachedLookup(FbgemmLookup):
    """weight_RD is a tensor of the GPU whose memory is the host's; what the cache holds is newer."""

    tier = "host"

    def __init__(
        self,
        rows: int,
        dim: int,
        optimizer: ValueOptimizer,
        device: torch.device,
        dtype: torch.dtype,
        cache: float,
    ) -> None:
        """`cache` is the share of the rows that it has room for."""
        with _array_for_list():
            super().__init__(
                rows,
                dim,
                optimizer,
                device,
                dtype,
                EmbeddingLocation.MANAGED_CACHING,
                cache_sets=cache_sets(rows, cache),  # by a load factor, it would shrink to what memory is free
                uvm_host_mapped=rows * dim * dtype.itemsize >= _PINNED_FROM,
            )
        self._latest: tuple | None = None

    def read(self, hits: Hits, update_follows: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
        pooled_GD = super().read(hits, update_follows, dtype)
        self._latest = hits.tape
        return pooled_GD

    def _bags(self, hits: Hits) -> tuple[Tensor, Tensor]:
        return hits.rows_H.long(), hits.offsets_G1  # FBGEMM's cache takes no int32

    def update(self, hits: Hits, gradient_GD: Tensor, of_weights: bool = True) -> Tensor | None:
        if hits.tape is not self._latest:  # its places in the cache may have been given to rows of a later look-up
            hits.tape = None
        self._latest = None
        return super().update(hits, gradient_GD, of_weights)

    def settle(self) -> None:
        """Write back what the cache holds, and empty it: then weight_RD is all there is."""
        self._latest = None
        self._tbe.flush()
        self._tbe.reset_cache_states()


@contextmanager
def _array_for_list() -> Iterator[None]:
    """While TBE is made, its map from rows to tables is an array: FBGEMM's Python list takes 8 bytes a row, twice."""
    theirs = tbe_training.construct_cache_state
    tbe_training.construct_cache_state = _cache_state
    try:
        yield
    finally:
        tbe_training.construct_cache_state = theirs


def _cache_state(rows: list[int], locations: list[EmbeddingLocation], tables: list[int]) -> CacheState:
    """What FBGEMM makes of one table with a cache: where it begins and ends, the table of each row, the rows."""
    (count,) = rows
    return CacheState([0, count], np.zeros(count, dtype=np.int32), count)
