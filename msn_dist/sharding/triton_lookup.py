"""The look-up by this project's own Triton kernels.

Shape suffixes: R rows on this rank, D value width, G bags, H hits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from msn_dist.kernels import ops
from msn_dist.sharding.lookup import ValueOptimizer

if TYPE_CHECKING:
    from msn_dist.sharding.hits import Hits


class TritonLookup:
    """One pass over the hits forward, one backward that also steps the rows."""

    name = "triton"

    def __init__(self, rows: int, dim: int, optimizer: ValueOptimizer, device: torch.device) -> None:
        self.optimizer = optimizer
        self.learning_rate = optimizer.learning_rate
        self.weight_RD = torch.empty(rows, dim, device=device)
        self.moment_R = torch.zeros(rows, device=device)
        self.anchor = torch.zeros((), device=device, requires_grad=True)

    def read(self, hits: Hits, update_follows: bool = False) -> Tensor:
        return ops.sparse_gather(self.weight_RD, hits.rows_H, hits.weights_H, _offsets(hits))

    def update(self, hits: Hits, gradient_GD: Tensor, of_weights: bool = True) -> Tensor | None:
        of_weights = of_weights and hits.weights_H is not None
        gradient_H = ops.sparse_adagrad_(
            self.weight_RD,
            self.moment_R,
            hits.rows_H,
            hits.weights_H,
            _offsets(hits),
            gradient_GD.contiguous(),
            self.learning_rate,
            self.optimizer.eps,
            of_weights,
        )
        return gradient_H if of_weights else None

    def set_learning_rate(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate


def _offsets(hits: Hits) -> Tensor | None:
    """None where every bag is one row, which the kernels then need not be told."""
    return None if hits.weights_H is None else hits.offsets_G1
