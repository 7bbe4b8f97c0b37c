"""Hits sorted by the rank that owns their row, and the rows that they share.

Shape suffixes: M bags, L hits a bag, H = M * L hits, W ranks, P (bag, owner) pairs with a hit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from msn_dist.kernels.sizes import key_dtype

MOST_RANKS_OF_KERNEL = 1024  # as kernels.bucketing, which cannot be imported without Triton


@dataclass(frozen=True)
class Buckets:
    """Hits in the order of (owner, bag)."""

    order_H: Tensor  # int64: place in the flattened [M, L] of the hit that comes h-th
    lengths_WM: Tensor  # int64: hits of bag m on owner w

    @property
    def hits_W(self) -> Tensor:
        """Hits on each owner, int64."""
        return self.lengths_WM.sum(1)

    @property
    def pairs_W(self) -> Tensor:
        """Bags with a hit on each owner, int64."""
        return (self.lengths_WM > 0).sum(1)

    def pairs(self, count: int) -> tuple[Tensor, Tensor]:
        """(bag_P, first_P) of the `count` pairs in order: the bag, and where its hits on this owner begin."""
        lengths_X = self.lengths_WM.flatten()
        pair_P = torch.nonzero_static(lengths_X, size=count).flatten()
        first_X = lengths_X.cumsum(0) - lengths_X
        return pair_P % self.lengths_WM.shape[1], first_X[pair_P]


def bucket_rows(row_ML: Tensor, block: int, world: int) -> tuple[Buckets, Tensor]:
    """(buckets, row_H in their order, local to the owner) of rows in blocks of `block`, rank after rank.

    row_H is int32 for blocks below 2^31 rows, else int64.
    """
    bags, hits = row_ML.shape
    row_H = row_ML.flatten()
    owner_H = row_H // block
    # a stable sort keeps the hits of a bag together; few owners fit a byte, which sorts faster
    order_H = owner_H.to(torch.uint8 if world <= 256 else torch.int32).argsort(stable=True)
    bag_H = torch.arange(bags, device=row_H.device).repeat_interleave(hits)
    lengths_X = torch.bincount(owner_H * bags + bag_H, minlength=world * bags)
    local_H = (row_H - owner_H * block).to(torch.int32 if block < 2**31 else torch.int64)
    return Buckets(order_H, lengths_X.view(world, bags)), local_H[order_H]


def bucket_rows_by_kernel(row_ML: Tensor, block: int, world: int) -> tuple[Buckets, Tensor]:
    """The same by the Triton kernels."""
    from msn_dist.kernels.bucketing import bucket_hits

    order_H, row_H, lengths_WM = bucket_hits(row_ML, block, world)
    return Buckets(order_H, lengths_WM), row_H


def distinct_rows(row_ML: Tensor, block: int, world: int) -> tuple[Tensor, Tensor, Tensor]:
    """(row_H, where_ML, rows_W): the distinct rows in ascending order, where each hit's is, how many each owner has.

    Of row_H, local to the owner and typed as in `bucket_rows`, the first rows_W.sum() are filled: how many these are is
    left on the device, as the host would wait for it.
    """
    sorted_H, order_H = row_ML.flatten().to(key_dtype(block * world)).sort()
    first_H = torch.ones_like(sorted_H, dtype=torch.bool)
    torch.ne(sorted_H[1:], sorted_H[:-1], out=first_H[1:])
    until_H1 = F.pad(first_H.cumsum(0), (1, 0))  # distinct rows among the first hits
    place_H = until_H1[1:] - 1
    where_H = torch.empty_like(order_H).scatter_(0, order_H, place_H)
    local_H = (sorted_H % block).to(torch.int32 if block < 2**31 else torch.int64)
    row_H = torch.empty_like(local_H).scatter_(0, place_H, local_H)
    begin_W = block * torch.arange(world, dtype=sorted_H.dtype, device=sorted_H.device)
    hit_W1 = F.pad(torch.searchsorted(sorted_H, begin_W), (0, 1), value=len(sorted_H))
    return row_H, where_H.view_as(row_ML), until_H1[hit_W1].diff()
