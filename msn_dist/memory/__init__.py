"""Product-key memory: plain PyTorch, exact, the reference for everything faster."""

from msn_dist.memory.health import MemoryHealth
from msn_dist.memory.layer import Memory
from msn_dist.memory.placement import Placement
from msn_dist.memory.product_keys import ProductKeys
from msn_dist.memory.values import MemoryValues

__all__ = ["Memory", "MemoryHealth", "MemoryValues", "Placement", "ProductKeys"]
