"""What the planner may choose for the memories of a model."""

from __future__ import annotations

from dataclasses import dataclass

from msn_dist.config import ValueOptimizerKind


@dataclass(frozen=True)
class Layout:
    """How every memory of a model lies on the ranks; the names are those of MemoryConfig and ValueOptimizerConfig."""

    world: int
    ranks_per_node: int
    strategy: str
    wire: str = "fp32"
    value_dtype: str = "fp32"
    lookup: str = "fbgemm"  # never "auto": what it comes to on the planned device
    optimizer: ValueOptimizerKind = "rowwise_adagrad"
    tier: str = "device"

    @property
    def nodes(self) -> int:
        return self.world // self.ranks_per_node
