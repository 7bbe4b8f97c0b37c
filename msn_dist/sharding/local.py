"""One rank holds the table and all hits are its own: every strategy at W = 1.

Shape suffixes: M bags, L hits a bag.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchrec.distributed.types import Awaitable, LazyAwaitable, LazyNoWait, NoWait

from msn_dist.memory.autocast import pooled_dtype
from msn_dist.sharding.hits import Hits
from msn_dist.sharding.row_sharded import RowSharded
from msn_dist.sharding.sharded_values import ExchangeContext


class Local(RowSharded):
    """No owners to sort by, no messages, and no counts that the host must wait for."""

    def forward(self, slots_ML: Tensor, weights_ML: Tensor) -> Tensor:
        """The three phases at once: awaitables take the host as long as the look-up."""
        return self.compute(self.create_context(), self._hits(slots_ML, weights_ML))

    def input_dist(self, ctx: ExchangeContext, slots_ML: Tensor, weights_ML: Tensor) -> Awaitable[Awaitable[Hits]]:
        return NoWait(NoWait(self._hits(slots_ML, weights_ML)))

    def looked_up_dtype(self, device_type: str) -> torch.dtype:
        """What is looked up is the sum."""
        return pooled_dtype(device_type)

    def output_dist(self, ctx: ExchangeContext, output: Tensor) -> LazyAwaitable[Tensor]:
        return LazyNoWait(output)

    def _hits(self, slots_ML: Tensor, weights_ML: Tensor) -> Hits:
        row_H = self.placement.row_of(slots_ML).flatten().to(self.row_dtype)
        return Hits.uniform(row_H, weights_ML.flatten().to(torch.float32), size=slots_ML.shape[1])
