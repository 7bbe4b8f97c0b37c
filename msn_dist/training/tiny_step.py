"""A training step with next to no data: on a GPU its time is the host's, which calibration wants to know."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from msn_dist.config import DataConfig, MemoryConfig, RankMixerConfig, RunConfig, TrainingConfig
from msn_dist.data.batch import Batch
from msn_dist.data.schema import Schema
from msn_dist.training.optimizers import Optimizers
from msn_dist.training.ranks import Ranks
from msn_dist.training.sharded_model import build_sharded_model
from msn_dist.training.step import train_step

_ROWS = 8  # of a rank


def tiny_config(layers: int, memories: int, world: int) -> tuple[RunConfig, Schema, int]:
    """(config, schema, rows a rank): what steps have, id tables, so many layers and `memories`, autocast."""
    rows = 64 * world  # of a table
    schema = Schema(
        name="tiny", tables={"user": rows, "item": rows}, ids={"user": "user", "item": "item"}, dense=["age"],
        labels=["click"], group="user",
    )  # fmt: skip
    carrying = {"block": "msn_ffn", "memory_layers": list(range(memories))} if memories else {"block": "ffn"}
    config = RunConfig(
        name="tiny",
        data=DataConfig(path=".", batch_size=_ROWS * world),
        model=RankMixerConfig(tokens=4, width=32, layers=layers, **carrying),
        memory=MemoryConfig(sub_keys=8 * world, top_k=4) if memories else None,
        training=TrainingConfig(precision="bf16"),
    )
    return config, schema, _ROWS


def tiny_step(ranks: Ranks, layers: int, memories: int) -> tuple[RunConfig, Schema, int, Callable[[], Tensor]]:
    """(config, schema, rows a rank, step); a collective call, as every call of the step."""
    config, schema, _ = tiny_config(layers, memories, ranks.world)
    model, *_ = build_sharded_model(config, schema, ranks)
    optimizers = Optimizers(model, [], config.optimizer, total_steps=1)
    ids = torch.arange(2 * _ROWS)
    sparse = KeyedJaggedTensor(keys=schema.sparse_keys, values=ids, lengths=torch.ones_like(ids), stride=_ROWS)
    sparse.sync()
    batch = Batch(sparse, torch.zeros(_ROWS, 1), torch.zeros(_ROWS, 1), ids[:_ROWS]).to(ranks.device)

    def step() -> Tensor:
        optimizers.set_rates(0)
        return train_step(model, optimizers, batch, config.data.batch_size, ranks.world, config.training.precision)

    return config, schema, _ROWS, step
