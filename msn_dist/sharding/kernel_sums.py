"""`sums.Sums` by this project's own Triton kernels, for bags of one size.

Shape suffixes: R rows of a table, D its width, G bags, L hits of each, U distinct rows among the hits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from msn_dist.kernels import ops
from msn_dist.kernels.sparse_scatter import gather_backward

if TYPE_CHECKING:
    from msn_dist.sharding.hits import Hits


class KernelSums:
    """Hits that many bags share cost no atomics, and sums repeat to the bit."""

    name = "triton"

    def pooled(self, table_RD: Tensor, hits: Hits, dtype: torch.dtype) -> Tensor:
        rows_GL, weights_GL = (of_hits.view(-1, hits.size) for of_hits in (hits.rows_H, hits.weights_H))
        return ops.sparse_gather(table_RD, rows_GL, weights_GL, None, dtype)

    def rows(self, table_RD: Tensor, rows_U: Tensor, dtype: torch.dtype) -> Tensor:
        """An eighth to half of the time of torch's indexing on an H200, for rows of 64 and 256 bytes."""
        return ops.sparse_gather(table_RD, rows_U, None, None, dtype)

    def gradients(
        self,
        table_RD: Tensor,
        hits: Hits,
        gradient_GD: Tensor,
        of_weights: bool = True,
        distinct: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One pass gives both gradients, so that those of the weights are made in any case."""
        values_RD, where_H = table_RD, hits.rows_H
        if distinct is not None:
            rows_U, where_H = distinct
            values_RD = self.rows(table_RD, rows_U, table_RD.dtype)
        where_GL, weights_GL = (of_hits.view(-1, hits.size) for of_hits in (where_H, hits.weights_H))
        gradients = gather_backward(values_RD, where_GL, weights_GL, gradient_GD, all_hit=distinct is not None)
        return gradients[0], gradients[1].flatten() if of_weights else None
