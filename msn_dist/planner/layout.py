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
    group_ranks: int | None = None  # of two_level; None: a node

    @property
    def ranks_of_group(self) -> int:
        return self.ranks_per_node if self.group_ranks is None else self.group_ranks

    @property
    def groups(self) -> int:
        return self.world // self.ranks_of_group

    def __str__(self) -> str:
        return in_groups(self.strategy, self.group_ranks)


def in_groups(strategy: str, group_ranks: int | None) -> str:
    """The strategy as people read it, with its groups if they are not nodes."""
    return strategy if group_ranks is None else f"{strategy} in groups of {group_ranks}"


def group_sizes(world: int, ranks_per_node: int) -> list[int | None]:
    """What `group_ranks` may be: a node, which comes first, parts of one, and several nodes; neither 1 nor W ranks."""
    sizes = [size for size in range(2, world) if world % size == 0 and size != ranks_per_node]
    return [None, *(size for size in sizes if ranks_per_node % size == 0 or size % ranks_per_node == 0)]
