"""Hits sorted by the rank that owns their row.

Shape suffixes: M bags, L hits a bag, H = M * L hits, W ranks, P (bag, owner) pairs with a hit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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


def bucket(owner_ML: Tensor, world: int) -> Buckets:
    """Buckets of hits whose owners are given, int64 in [0, world)."""
    bags, hits = owner_ML.shape
    owner_H = owner_ML.flatten()
    # a stable sort keeps the hits of a bag together; few owners fit a byte, which sorts faster
    order_H = owner_H.to(torch.uint8 if world <= 256 else torch.int32).argsort(stable=True)
    bag_H = torch.arange(bags, device=owner_H.device).repeat_interleave(hits)
    lengths_X = torch.bincount(owner_H * bags + bag_H, minlength=world * bags)
    return Buckets(order_H, lengths_X.view(world, bags))
