"""The value table over many ranks."""

from msn_dist.sharding.lookup import ValueOptimizer
from msn_dist.sharding.sharded_values import ShardedMemoryValues
from msn_dist.sharding.sharder import MemoryValuesSharder

__all__ = ["MemoryValuesSharder", "ShardedMemoryValues", "ValueOptimizer"]
