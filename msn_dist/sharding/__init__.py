"""The value table over many ranks."""

from msn_dist.sharding.sharded_values import ShardedMemoryValues
from msn_dist.sharding.sharder import MemoryValuesSharder
from msn_dist.sharding.value_optimizer import ValueOptimizer

__all__ = ["MemoryValuesSharder", "ShardedMemoryValues", "ValueOptimizer"]
