"""The look-up by this project's own Triton kernels.

Shape suffixes: R rows on this rank, D value width, G bags, H hits, L hits of every bag where they are equal, A rows
that came from their owners.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from msn_dist.kernels import ops
from msn_dist.kernels.sparse_scatter import gather_backward
from msn_dist.sharding.lookup import OnDevice
from msn_dist.sharding.value_optimizer import ValueOptimizer, ValueState

if TYPE_CHECKING:
    from msn_dist.sharding.hits import Hits


class TritonLookup(OnDevice):
    """One pass over the hits forward, one backward that also steps the rows."""

    name = "triton"

    def __init__(
        self,
        rows: int,
        dim: int,
        optimizer: ValueOptimizer,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.optimizer = optimizer
        self.learning_rate = optimizer.learning_rate
        self.weight_RD = torch.empty(rows, dim, dtype=dtype, device=device)
        self.state = ValueState.of(optimizer.kind, rows, dim, device)
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self._seeds = None if dtype == torch.float32 else random.Random(seed)

    def read(self, hits: Hits, update_follows: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
        return ops.sparse_gather(self.weight_RD, *_bags(hits), dtype)

    def update(self, hits: Hits, gradient_GD: Tensor, of_weights: bool = True) -> Tensor | None:
        of_weights = of_weights and hits.weights_H is not None
        optimizer = self.optimizer
        gradient_H = ops.sparse_update_(
            self.weight_RD,
            self.state.moment_R,
            self.state.first_RD,
            *_bags(hits),
            gradient_GD.contiguous(),
            optimizer.kind,
            [self.learning_rate, optimizer.eps, optimizer.beta1, optimizer.beta2],
            self.state.next_step(),
            of_weights,
            None if self._seeds is None else self._seeds.getrandbits(31),
        )
        return gradient_H.flatten() if of_weights else None

    def gather(self, rows_AD: Tensor, where_GL: Tensor, weights_GL: Tensor) -> Tensor:
        """pooled_GD of rows that are not the table's, float32."""
        return ops.sparse_gather(rows_AD, where_GL, weights_GL, None)

    def gather_backward(
        self, rows_AD: Tensor, where_GL: Tensor, weights_GL: Tensor, gradient_GD: Tensor, once: bool
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the rows and of the weights, float32; every row is hit, and with `once` by one hit alone."""
        return gather_backward(rows_AD, where_GL, weights_GL, gradient_GD, once=once)

    def set_learning_rate(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate


def _bags(hits: Hits) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows, weights and offsets as the kernels take them: [G, L] without offsets is faster."""
    if hits.size is None:
        return hits.rows_H, hits.weights_H, hits.offsets_G1
    weights_GL = None if hits.weights_H is None else hits.weights_H.view(-1, hits.size)
    return hits.rows_H.view(-1, hits.size), weights_GL, None
