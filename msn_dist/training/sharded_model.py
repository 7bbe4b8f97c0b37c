"""From a config to a model over all ranks: build on meta, plan, shard, fill."""

from __future__ import annotations

import zlib

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch.distributed.tensor import DTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel

from msn_dist.config import OptimizerConfig, RunConfig
from msn_dist.data.schema import Schema
from msn_dist.memory.placement import Placement, initial_values
from msn_dist.memory.product_keys import choose_retrieval
from msn_dist.memory.values import VALUE_DTYPES
from msn_dist.models.parameters import count_parameters
from msn_dist.models.ranker import Ranker
from msn_dist.planner import Plan, make_plan
from msn_dist.planner.plan_file import PlanFile
from msn_dist.sharding import MemoryValuesSharder, ShardedMemoryValues, ValueOptimizer
from msn_dist.sharding.lookup import choose_lookup
from msn_dist.sharding.strategies import require_ranks
from msn_dist.training.host_memory import free_host_bytes, require_cpu_memory, require_host_memory
from msn_dist.training.ranks import Ranks


def build_sharded_model(
    config: RunConfig, schema: Schema, ranks: Ranks, planned: PlanFile | None = None, *, to_be_loaded: bool = False
) -> tuple[DistributedModelParallel, Plan, dict[str, int]]:
    """(model over all ranks, its plan, its parameter counts); the same start at every world size.

    Values that are `to_be_loaded` from a checkpoint have no initial ones, which take long for a large table.

    `planned` says where the id tables lie; of memories `config` says it.  Raises InputError, on every rank, if a back
    end of the memory cannot run on one of them, a host has no room for the values that are to lie there, or the ranks
    are such that its strategy cannot have them.
    """
    if config.memory is not None:
        width = config.memory.value_dim or config.model.width
        config.memory.require_rows(config.data.batch_size // ranks.world)
        ranks.together(lambda: _require_back_ends(config, width, ranks.device))
        by = config.memory.strategy, config.memory.group_ranks
        ranks.together(lambda: require_ranks(*by, width, ranks.world, ranks.local_world))
    ranker = Ranker(schema, config.model, config.memory, seed=config.seed, device=torch.device("meta"))
    for memory in ranker.memories().values():
        memory.values.to_be_loaded = to_be_loaded
    counts = count_parameters(ranker)
    ranks.together(lambda: _require_host(config, ranker, ranks))
    adagrad = {
        "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        "learning_rate": config.optimizer.ids.lr,
        "eps": 1e-8,
    }
    sharders = [
        MemoryValuesSharder(_value_optimizer(config.optimizer), ranks.local_world),
        EmbeddingBagCollectionSharder(fused_params=adagrad),
        EmbeddingCollectionSharder(fused_params=adagrad, use_index_dedup=False),
    ]
    id_tables = None if planned is None else planned.id_tables
    plan = make_plan(ranker, sharders, ranks.world, ranks.local_world, ranks.device.type, id_tables)
    model = DistributedModelParallel(
        ranker, env=ranks.sharding_env(), device=ranks.device, plan=plan.sharding, sharders=sharders
    )
    _fill_id_tables(model, config)
    torch.manual_seed((config.seed << 16) + ranks.rank)  # dropout, from here on: other masks on every rank
    return model, plan, counts


def id_table_shards(model: DistributedModelParallel) -> list[tuple[str, int, int, torch.Tensor]]:
    """(table, its rows on all ranks, first row, embeddings) of every part that lies on this rank."""
    shards = []
    for name, tensor in model.state_dict().items():
        if not name.startswith("features.") or not isinstance(tensor, DTensor):
            continue
        local = tensor.to_local()
        # a rank without this table has no shard of it, but an offset all the same
        for shard, (first_row, *_) in zip(local.local_shards(), local.local_offsets(), strict=False):
            shards.append((name.split(".")[-2], tensor.shape[0], first_row, shard))
    return shards


def sharded_memories(model: DistributedModelParallel) -> dict[str, ShardedMemoryValues]:
    """The sharded value tables, keyed "layer0", "layer1", ..."""
    return {name: memory.values for name, memory in model.module.memories().items()}


def memory_back_ends(model: DistributedModelParallel, device: torch.device) -> dict[str, str]:
    """{"retrieval": name, "lookup": name}, the same in all memories, and "tier" if it is the host; {} without one."""
    for memory in model.module.memories().values():
        lookup = memory.values.lookup
        tier = {"tier": lookup.tier} if lookup.tier != "device" else {}
        return {"retrieval": memory.keys.back_end(device), "lookup": lookup.name, **tier}
    return {}


def _require_back_ends(config: RunConfig, value_dim: int, device: torch.device) -> None:
    memory = config.memory
    choose_retrieval(memory.retrieval, device.type, memory.top_k, memory.sub_keys, memory.key_dim)
    dtype, optimizer = VALUE_DTYPES[memory.value_dtype], config.optimizer.values.kind
    choose_lookup(memory.lookup, device, value_dim, dtype, optimizer, memory.tier)


def _require_host(config: RunConfig, ranker: Ranker, ranks: Ranks) -> None:
    on_cpu = ranks.device.type == "cpu"
    if config.memory is None or not (on_cpu or config.memory.tier == "host"):
        return
    values = sum(memory.values.weight.nbytes for memory in ranker.memories().values())
    shares = 1 if config.memory.strategy == "replicated" else ranks.world
    require = require_cpu_memory if on_cpu else require_host_memory
    require(values * ranks.local_world // shares, free_host_bytes())


def _value_optimizer(config: OptimizerConfig) -> ValueOptimizer:
    values = config.values
    return ValueOptimizer(config.dense.lr * values.multiplier, values.eps, values.kind, values.beta1, values.beta2)


@torch.no_grad()
def _fill_id_tables(model: DistributedModelParallel, config: RunConfig) -> None:
    """Initial embeddings by (seed, table, row, column), as for memory values: TorchRec's depend on the rank."""
    for table, rows, first_row, shard in id_table_shards(model):
        initial_values(
            Placement(rows),
            first_row,
            shard,
            std=config.optimizer.ids.init_std,
            seed=config.seed ^ zlib.crc32(table.encode()),
        )
