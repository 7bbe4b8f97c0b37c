"""What the planner may choose for the memories of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from msn_dist.config import MemoryConfig

Tier = Literal["device", "host"]


@dataclass(frozen=True)
class Layout:
    """How every memory of a model lies on the ranks; the names are those of MemoryConfig."""

    world: int
    ranks_per_node: int
    strategy: str
    wire: str = "fp32"
    value_dtype: str = "fp32"
    lookup: str = "fbgemm"  # never "auto": what it comes to on the planned device

    @property
    def nodes(self) -> int:
        return self.world // self.ranks_per_node

    def applied_to(self, memory: MemoryConfig) -> MemoryConfig:
        """The configuration that trains so."""
        chosen = {"strategy": self.strategy, "wire": self.wire, "value_dtype": self.value_dtype}
        return memory.model_copy(update=chosen)
