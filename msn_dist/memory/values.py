"""The value table, whole on one device: plain, exact, dense gradients.

`msn_dist.sharding` puts the same table over many ranks.

Shape suffixes: M bags, L hits a bag, n slots, D value width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msn_dist.memory.health import MemoryHealth, SlotUsage
from msn_dist.memory.placement import Placement, initial_values


class MemoryValues(nn.Module):
    """n learnable slots of width D, read as weighted sums.

    Row r of `weight` holds slot `placement.slot_of(r)`, at every world size.  Build it on the
    "meta" device to shard a table that fits no single one.
    """

    def __init__(
        self,
        slots: int,
        dim: int,
        *,
        init_std: float,
        seed: int,
        lookup: str = "fbgemm",
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.slots, self.dim, self.init_std, self.seed = slots, dim, init_std, seed
        self.lookup_kind = lookup  # of the sharded table
        self.placement = Placement.permuted(slots)
        self.weight = nn.Parameter(torch.empty(slots, dim, device=device))
        self.usage = SlotUsage(slots, device=device)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            self.fill(self.weight, first_row=0)

    def fill(self, rows_RD: Tensor, first_row: int) -> None:
        """Write the initial values of the rows from `first_row` on into rows_RD."""
        initial_values(
            self.placement, first_row, len(rows_RD), self.dim, std=self.init_std, seed=self.seed, out=rows_RD
        )

    def forward(self, slots_ML: Tensor, weights_ML: Tensor) -> Tensor:
        """pooled_MD = sum over l of weights[m, l] * value of slots[m, l]."""
        rows_ML = self.placement.row_of(slots_ML)
        if self.training:
            self.usage.count(rows_ML.flatten())
        return torch.einsum("ml,mld->md", weights_ML.to(self.weight.dtype), self.weight[rows_ML])

    def health(self) -> MemoryHealth:
        """How the slots were used since the last call."""
        return self.usage.read(self.slots)
