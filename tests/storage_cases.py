"""Small training runs whose tensors are counted, for test_storage."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from tensor_bytes import mark, settled_messages, tensor_bytes
from torchrec.distributed.comm_ops import set_use_sync_collectives
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from msn_dist.config import RunConfig
from msn_dist.data.batch import Batch
from msn_dist.data.schema import History, Schema
from msn_dist.models.loss import task_losses
from msn_dist.planner.loopback import Distinct
from msn_dist.planner.plan import TableShards
from msn_dist.sharding.row_gather import RowGatherUnique
from msn_dist.training.evaluation import autocast
from msn_dist.training.optimizers import Optimizers
from msn_dist.training.ranks import Ranks
from msn_dist.training.sharded_model import build_sharded_model, id_table_shards, sharded_memories

SCHEMA = Schema(
    name="wide",
    tables={"user": 5000, "item": 3000, "city": 40},
    ids={"user": "user", "item": "item", "city": "city"},
    histories={"past": History(max_length=4, columns={"past_items": "item"})},
    dense=["age", "price"],
    labels=["view", "like"],
    group="user",
)
ROWS = 256  # of a rank
STEPS = 3
RANKMIXER = {"backbone": "rankmixer", "tokens": 8, "width": 64, "layers": 2, "embedding_dim": 16}
DLRM = {"backbone": "dlrm", "hidden": [200, 100], "tokens": 8, "width": 64, "embedding_dim": 16}
MEMORY = {"sub_keys": 64, "top_k": 8, "key_dim": 16}


def config_of(
    world: int, model: dict, memory: dict | None, precision: str = "fp32", optimizer: str = "rowwise_adagrad"
) -> RunConfig:
    tree = {
        "name": "storage",
        "data": {"path": "unused", "batch_size": ROWS * world},
        "model": model,
        "memory": memory,
        "optimizer": {"values": {"kind": optimizer}},
        "training": {"device": "cpu", "precision": precision},
    }
    return RunConfig.model_validate(tree)


def batch_of(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    lengths = {key: 1 for key in SCHEMA.ids} | {"past_items": 4}
    values = [
        torch.randint(SCHEMA.tables[SCHEMA.table_of(key)], (ROWS * length,), generator=generator)
        for key, length in lengths.items()
    ]
    sparse = KeyedJaggedTensor(
        keys=SCHEMA.sparse_keys,
        values=torch.cat(values),
        lengths=torch.tensor(list(lengths.values())).repeat_interleave(ROWS),
        stride=ROWS,
    )
    labels_BK = (torch.rand(ROWS, len(SCHEMA.labels), generator=generator) < 0.3).float()
    dense_BF = torch.rand(ROWS, len(SCHEMA.dense), generator=generator)
    return Batch(sparse, dense_BF, labels_BK, torch.zeros(ROWS, dtype=torch.int64))


@dataclass(frozen=True)
class Measured:
    """Of one rank and case."""

    between: int  # bytes that live between steps
    step: int  # bytes more at the peak of a step
    phases: dict[str, int]  # the same by phase
    tables: list[TableShards]
    distinct: Distinct | None  # rows that were hit in the last step


def measured(rank: int, world: int, configs: dict[str, RunConfig]) -> dict[str, Measured]:
    """By case, in the last of some steps: AdamW makes its state in the first."""
    set_use_sync_collectives(True)
    ranks = Ranks(rank, world, world, torch.device("cpu"), dist.group.WORLD, dist.group.WORLD)
    found = {}
    for name, config in configs.items():
        with settled_messages(), tensor_bytes() as counted:
            model, plan, _ = build_sharded_model(config, SCHEMA, ranks)
            shards = [shard for *_, shard in id_table_shards(model)]
            optimizers = Optimizers(model, shards, config.optimizer, STEPS)
            for step in range(STEPS):
                distinct_rows(model)  # from here on
                with mark("batch"):
                    batch = batch_of(seed=rank)
                train(model, optimizers, batch, step, config, ranks)
                del batch
        between = counted.live("batch")
        phases = {phase: counted.peak(phase) - between for phase in ("forward", "backward", "optimizer")}
        found[name] = Measured(between, max(phases.values()), phases, plan.tables, distinct_rows(model))
        del model, optimizers, shards
    gc.collect()
    return found


def distinct_rows(model: Any) -> Distinct | None:
    """Rows that were hit since the last call; of a rank's hits with strategy row_gather_unique alone, which tells."""
    for values in sharded_memories(model).values():
        health = values.health()
        by_chunk = health.hits // values.exchange.world if isinstance(values, RowGatherUnique) else 0
        return Distinct(by_chunk, of_all=round(health.window_used_share * health.slots))
    return None


def train(model: Any, optimizers: Optimizers, batch: Batch, step: int, config: RunConfig, ranks: Ranks) -> None:
    """A step as the Trainer's."""
    with mark("forward"):
        optimizers.set_rates(step)
        with autocast(ranks.device, config.training.precision):
            output = model(batch)
        sums_K = task_losses(output.logits_BK, batch.labels_BK)
        loss = (sums_K.sum() + output.auxiliary * len(batch)) / len(batch)
    with mark("backward"):
        optimizers.zero_grad()
        loss.backward()
    with mark("optimizer"):
        optimizers.step()
