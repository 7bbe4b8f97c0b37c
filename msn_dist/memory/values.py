"""The value table, whole on one device: plain, exact, dense gradients.

`msn_dist.sharding` puts the same table over many ranks.

Shape suffixes: M bags, L hits a bag, n slots, D value width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from msn_dist.memory.autocast import autocast_dtype
from msn_dist.memory.health import MemoryHealth, SlotUsage
from msn_dist.memory.placement import Placement, initial_values

VALUE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # as in MemoryConfig


@dataclass(frozen=True)
class ValueSharding:
    """How `msn_dist.sharding` is to spread a table; the names are those of MemoryConfig."""

    strategy: str = "row_pooled"
    wire: str = "fp32"
    lookup: str = "auto"
    tier: str = "device"
    cache: float = 0.1
    group_ranks: int | None = None


class MemoryValues(nn.Module):
    """n learnable slots of width D, read as weighted sums.

    Row r of `weight` holds slot `placement.slot_of(r)`, at every world size.  Build it on the
    "meta" device to shard a table that fits no single one.  With a 16-bit `dtype` sums are float32, but the
    gradient is as the table: only a sharded one steps without losing what is small beside a value.
    """

    def __init__(
        self,
        slots: int,
        dim: int,
        *,
        init_std: float,
        seed: int,
        dtype: torch.dtype = torch.float32,
        sharding: ValueSharding = ValueSharding(),
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.slots, self.dim, self.init_std, self.seed = slots, dim, init_std, seed
        self.sharding = sharding
        self.to_be_loaded = False  # initial values are left out: a checkpoint will bring others
        self.placement = Placement.permuted(slots)
        self.weight = nn.Parameter(torch.empty(slots, dim, dtype=dtype, device=device))
        self.usage = SlotUsage(slots, device=device)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            self.fill(self.weight, first_row=0)

    def fill(self, rows_RC: Tensor, first_row: int, first_column: int = 0) -> None:
        """Write the initial values of the rows and columns that begin there into rows_RC, rounded to its dtype."""
        if self.to_be_loaded:
            return
        initial_values(self.placement, first_row, rows_RC, std=self.init_std, seed=self.seed, first_column=first_column)

    def forward(self, slots_ML: Tensor, weights_ML: Tensor) -> Tensor:
        """pooled_MD = sum over l of weights[m, l] * value of slots[m, l]; under autocast rounded to its dtype."""
        rows_ML = self.placement.row_of(slots_ML)
        if self.training:
            self.usage.count(rows_ML.flatten())
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        kind = self.weight.device.type
        with torch.autocast(kind, enabled=False):
            pooled_MD = torch.einsum("ml,mld->md", weights_ML.to(dtype), self.weight[rows_ML].to(dtype))
        return pooled_MD.to(autocast_dtype(kind) or dtype)

    def pooled_in_chunks(self, chunks: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """pooled_MD of each (slots_ML, weights_ML)."""
        return [self(slots_ML, weights_ML) for slots_ML, weights_ML in chunks]

    def health(self) -> MemoryHealth:
        """How the slots were used since the last call."""
        return self.usage.read(self.slots)
