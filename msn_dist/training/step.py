"""One training step, and a small one that calibration times."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from msn_dist.config import DataConfig, MemoryConfig, RankMixerConfig, RunConfig, TrainingConfig
from msn_dist.data.batch import Batch
from msn_dist.data.schema import Schema
from msn_dist.models.loss import task_losses
from msn_dist.training.evaluation import autocast
from msn_dist.training.optimizers import Optimizers
from msn_dist.training.ranks import Ranks
from msn_dist.training.sharded_model import build_sharded_model

_TINY_ROWS = 8  # of a rank


def train_step(
    model: DistributedModelParallel, optimizers: Optimizers, batch: Batch, rows: int, world: int, precision: str
) -> Tensor:
    """Forward, backward with the update of all tables, step of the rest; returns this rank's summed loss.

    The loss is the mean over the global batch: its `rows` rows divide the sums of all `world` ranks, and since
    DistributedDataParallel averages gradients over ranks, each rank's share is scaled by W.
    """
    with autocast(batch.groups_B.device, precision):
        output = model(batch)
    sums_K = task_losses(output.logits_BK, batch.labels_BK)
    loss = (sums_K.sum() + output.auxiliary * len(batch)) * (world / rows)
    optimizers.zero_grad()
    loss.backward()
    optimizers.step()
    return sums_K.detach().sum()


def tiny_step(ranks: Ranks) -> tuple[RunConfig, Schema, int, Callable[[], Tensor]]:
    """(config, schema, rows a rank, step) of a training step with next to no data, all of whose time is the host's.

    It has what steps have: id tables, memories, per-token networks, autocast, tables and gradients over all ranks.
    """
    rows = 64 * ranks.world  # of a table
    schema = Schema(
        name="tiny", tables={"user": rows, "item": rows}, ids={"user": "user", "item": "item"}, dense=["age"],
        labels=["click"], group="user",
    )  # fmt: skip
    config = RunConfig(
        name="tiny",
        data=DataConfig(path=".", batch_size=_TINY_ROWS * ranks.world),
        model=RankMixerConfig(tokens=4, width=32, layers=4),
        memory=MemoryConfig(sub_keys=8 * ranks.world, top_k=4),
        training=TrainingConfig(precision="bf16"),
    )
    model, *_ = build_sharded_model(config, schema, ranks)
    optimizers = Optimizers(model, [], config.optimizer, total_steps=1)
    ids = torch.arange(2 * _TINY_ROWS)
    sparse = KeyedJaggedTensor(keys=schema.sparse_keys, values=ids, lengths=torch.ones_like(ids), stride=_TINY_ROWS)
    sparse.sync()
    batch = Batch(sparse, torch.zeros(_TINY_ROWS, 1), torch.zeros(_TINY_ROWS, 1), ids[:_TINY_ROWS]).to(ranks.device)

    def step() -> Tensor:
        optimizers.set_rates(0)
        return train_step(model, optimizers, batch, config.data.batch_size, ranks.world, config.training.precision)

    return config, schema, _TINY_ROWS, step
