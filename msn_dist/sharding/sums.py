"""Weighted sums over hits and their gradients, for tables whose rows are stepped by torch: by torch, or by the kernels.

A step that takes part of every row from other ranks, as those of `column` and `replicated`, is no kernel's; what comes
before it may be (`kernel_sums`).

Shape suffixes: R rows of a table, D its width, G bags, H hits, U distinct rows among the hits, X rows of a piece.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from msn_dist.sharding.hits import Hits

_PIECE = 2**22  # 16-bit numbers that are widened at once


class Sums(Protocol):
    """Everything is added up in float32, whatever the values are."""

    name: str  # as in MemoryConfig.lookup

    def pooled(self, table_RD: Tensor, hits: Hits, dtype: torch.dtype) -> Tensor:
        """pooled_GD: the weighted sum of each bag's rows, rounded to `dtype`."""
        ...

    def rows(self, table_RD: Tensor, rows_U: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of these rows [U, D], as `dtype`."""
        ...

    def gradients(
        self,
        table_RD: Tensor,
        hits: Hits,
        gradient_GD: Tensor,
        of_weights: bool = True,
        distinct: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of the rows of the table [R, D], zeros without a hit, and of the weights [H], or None; float32.

        With `distinct`, (rows_U, where_H) as torch.unique gives them, those of these rows [U, D] instead.
        """
        ...


class TorchSums:
    """By torch's operators."""

    name = "reference"

    def rows(self, table_RD: Tensor, rows_U: Tensor, dtype: torch.dtype) -> Tensor:
        return table_RD[rows_U].to(dtype)

    def pooled(self, table_RD: Tensor, hits: Hits, dtype: torch.dtype) -> Tensor:
        rows_HD = self.rows(table_RD, hits.rows_H, torch.float32)
        if hits.weights_H is None:
            return rows_HD.to(dtype)
        pooled_GD = rows_HD.new_zeros(len(hits.offsets_G1) - 1, rows_HD.shape[1])
        return pooled_GD.index_add_(0, hits.bag_H(), rows_HD * hits.weights_H[:, None]).to(dtype)

    def gradients(
        self,
        table_RD: Tensor,
        hits: Hits,
        gradient_GD: Tensor,
        of_weights: bool = True,
        distinct: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        gradient_GD = gradient_GD.float()
        gradient_HD, gradient_H = gradient_GD, None
        if hits.weights_H is not None:
            if of_weights:
                gradient_H = weights_gradient(table_RD, hits, gradient_GD)
            gradient_HD = gradient_GD[hits.bag_H()] * hits.weights_H[:, None]
        rows, where_H = (table_RD, hits.rows_H) if distinct is None else distinct
        return gradient_GD.new_zeros(len(rows), gradient_GD.shape[1]).index_add_(0, where_H, gradient_HD), gradient_H


def weights_gradient(values_RD: Tensor, hits: Hits, gradient_GD: Tensor) -> Tensor:
    """`reference.weights_gradient` in float32, without its temporaries [H, D]."""
    bag_H, gradient_GD = hits.bag_H(), gradient_GD.float()
    if values_RD.dtype == torch.float32:  # what `embedding_bag` runs in its backward
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            gradient_GD.contiguous(), values_RD, hits.rows_H.long(), hits.offsets_G1[:-1], bag_H, 0
        )
    piece = max(1, _PIECE // values_RD.shape[1])
    pieces = zip(bag_H.split(piece), hits.rows_H.split(piece), strict=True)
    return torch.cat([(gradient_GD[bag_X] * values_RD[row_X]).sum(1) for bag_X, row_X in pieces])
