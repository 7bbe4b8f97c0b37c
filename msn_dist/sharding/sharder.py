"""How DistributedModelParallel and TorchRec's planner shard a `MemoryValues`."""

from __future__ import annotations

import torch
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ModuleSharder, ShardingEnv, ShardingType

from msn_dist.errors import InputError
from msn_dist.memory.values import MemoryValues
from msn_dist.sharding.lookup import ValueOptimizer
from msn_dist.sharding.sharded_values import ShardedMemoryValues


class MemoryValuesSharder(ModuleSharder[MemoryValues]):
    """Pass it to DistributedModelParallel beside TorchRec's own sharders."""

    def __init__(self, optimizer: ValueOptimizer | None = None) -> None:
        super().__init__()
        self._optimizer = optimizer or ValueOptimizer()

    def shard(
        self,
        module: MemoryValues,
        params: EmbeddingModuleShardingPlan,
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedMemoryValues:
        sharding = params["weight"].sharding_type
        if sharding != ShardingType.ROW_WISE.value:
            raise InputError(f"{module_fqn}: the plan shards memory values {sharding}; they can be row_wise only")
        return ShardedMemoryValues(module, env.process_group, self._optimizer, device or torch.device("cpu"))

    @property
    def module_type(self) -> type[MemoryValues]:
        return MemoryValues

    def shardable_parameters(self, module: MemoryValues) -> dict[str, nn.Parameter]:
        return {"weight": module.weight}

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [ShardingType.ROW_WISE.value]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return [EmbeddingComputeKernel.FUSED.value]
