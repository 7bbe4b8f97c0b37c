"""Where the id tables of a situation lie, and what a step asks of the busiest rank for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

from msn_dist.models.features import Features
from msn_dist.planner.id_estimates import Links
from msn_dist.planner.id_tables import COLLECTIVES, plan_id_tables
from msn_dist.planner.plan import TableShards
from msn_dist.planner.situation import Situation

_SHARDINGS = ("table_wise", "row_wise")


@dataclass(frozen=True)
class IdPlan:
    """`seconds` a step, of the busiest rank."""

    tables: list[TableShards]
    seconds: float


def place_ids(situation: Situation, reserved_bytes: int) -> IdPlan:
    """By TorchRec's planner, on ranks that need `reserved_bytes` each for all else; NoRoom if they do not fit."""
    config, schema, machine, topology = situation.config, situation.schema, situation.machine, situation.topology
    features = Features(schema, config.model.embedding_dim, config.model.attention, device="meta")
    model = torch.nn.ModuleDict({"features": features})
    adagrad = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD}
    placed = plan_id_tables(
        model,
        [EmbeddingBagCollectionSharder(fused_params=adagrad), EmbeddingCollectionSharder(fused_params=adagrad)],
        topology,
        machine,
        situation.rows,
        reserved_bytes,
        ids_per_row=schema.max_lengths | situation.mean_lengths,
        shardings=_SHARDINGS,
    )
    weights = dict(model.named_parameters())
    tables = []
    for path, placements in placed.placements.items():
        part = "embeddings" if path.endswith("sequence_tables") else "embedding_bags"
        for table, placement in placements.items():
            rows, dim = weights[f"{path}.{part}.{table}.weight"].shape
            tables.append(TableShards(path, table, "ids", rows, dim, placement.sharding, placement.rows_per_rank))
    seconds = max(placed.seconds_W)
    if machine.id_step is not None:  # of one module, whose collectives the plan has too
        seconds += max(0.0, machine.id_step.seconds - COLLECTIVES["row_wise"] * Links(topology, machine).latency)
    if config.optimizer.ids.decay:  # of all rows, read and written
        bytes_W = (sum(t.rows_per_rank[rank] * t.dim * 4 for t in tables) for rank in range(topology.world))
        seconds += machine.pass_seconds(2 * max(bytes_W)) / config.optimizer.ids.decay_every
    return IdPlan(tables, seconds)
