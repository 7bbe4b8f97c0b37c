"""A model over the rows of one split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from msn_dist.config import DataConfig
from msn_dist.data.handshake import in_step
from msn_dist.data.on_device import on_device
from msn_dist.data.parquet import ParquetReader
from msn_dist.data.schema import Schema
from msn_dist.errors import InputError
from msn_dist.training.metrics import RankingMetrics
from msn_dist.training.ranks import Ranks


def open_split(split: str, data: DataConfig, schema: Schema, ranks: Ranks, seed: int = 0) -> ParquetReader:
    """This rank's reader of a split, shuffled if it is "train"; InputError on all ranks if it fails on one."""
    share, rest = divmod(data.batch_size, ranks.world)
    if share == 0:
        raise InputError(f"data.batch_size={data.batch_size} is less than one row for each of {ranks.world} ranks")
    return ranks.together(
        lambda: ParquetReader(
            Path(data.path, split),
            schema,
            share + (ranks.rank < rest),
            rank=ranks.rank,
            world_size=ranks.world,
            seed=seed,
            shuffle=split == "train",
            shuffle_buffer=data.shuffle_buffer,
            workers=data.workers,
            pinned=ranks.device.type == "cuda",
        )
    )


@torch.no_grad()
def evaluate(
    model: DistributedModelParallel,
    data: ParquetReader,
    schema: Schema,
    ranks: Ranks,
    precision: str,
    after: Callable[[int], None] = lambda batch: None,
) -> dict[str, dict[str, float]]:
    """Metrics of every task over all rows of all ranks; a collective call that leaves the model in eval mode.

    `after` is told the number of each batch, from 1, when it is done.
    """
    model.eval()
    metrics = RankingMetrics(schema.labels, ranks.control)
    for number, (batch, _) in enumerate(on_device(in_step(data, schema, ranks.control), ranks.device), 1):
        with autocast(ranks.device, precision):
            output = model(batch)
        metrics.update(output.logits_BK, batch.labels_BK, batch.groups_B)
        after(number)
    return metrics.compute()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Dense compute in bf16 where `precision` says so."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
