"""How DistributedModelParallel and TorchRec's planner shard a `MemoryValues`."""

from __future__ import annotations

import os

import torch
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ModuleSharder, ShardingEnv, ShardingType

from msn_dist.memory.values import MemoryValues
from msn_dist.sharding.sharded_values import ShardedMemoryValues
from msn_dist.sharding.strategies import shard_values
from msn_dist.sharding.value_optimizer import ValueOptimizer


class MemoryValuesSharder(ModuleSharder[MemoryValues]):
    """Pass it to DistributedModelParallel beside TorchRec's own sharders."""

    def __init__(self, optimizer: ValueOptimizer | None = None, ranks_per_node: int | None = None) -> None:
        """`ranks_per_node`: of two_level's groups, if no size is set; None: LOCAL_WORLD_SIZE, as torchrun sets it."""
        super().__init__()
        self._optimizer = optimizer or ValueOptimizer()
        self._ranks_per_node = ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    def shard(
        self,
        module: MemoryValues,
        params: EmbeddingModuleShardingPlan,
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedMemoryValues:
        """The layout is that of `module.sharding.strategy`; of the plan only the presence of the module counts."""
        values = shard_values(
            module, env.process_group, self._optimizer, device or torch.device("cpu"), self._ranks_per_node
        )
        values.exchange.memory = module_fqn or values.exchange.memory
        return values

    @property
    def module_type(self) -> type[MemoryValues]:
        return MemoryValues

    def shardable_parameters(self, module: MemoryValues) -> dict[str, nn.Parameter]:
        return {"weight": module.weight}

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [ShardingType.ROW_WISE.value]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return [EmbeddingComputeKernel.FUSED.value]
