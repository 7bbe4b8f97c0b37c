"""A small data set in the format that training reads (two labels, a history, uneven row groups), and runs on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from msn_dist.config import RunConfig
from msn_dist.data.folder import write_schema
from msn_dist.data.schema import History, Schema

SCHEMA = Schema(
    name="tiny",
    tables={"user": 40, "item": 30},
    ids={"user": "user", "item": "item"},
    histories={"past": History(max_length=4, columns={"past_items": "item"})},
    dense=["age"],
    labels=["view", "like"],
    group="user",
)
# Rows of the row groups. Two ranks get 150 and 100 training rows: one runs out of batches before the other.
ROW_GROUPS = {"train": [150, 60, 40], "valid": [50, 30], "test": [70, 50]}

MEMORY = {"sub_keys": 9, "top_k": 4, "heads": 2, "key_dim": 8}  # 81 slots: neither 2 nor 4 ranks divide them
RANKMIXER = {"backbone": "rankmixer", "tokens": 2, "width": 16, "embedding_dim": 8}
MODELS = {
    "msn_ffn": RANKMIXER | {"layers": 3, "memory_layers": [0, 2], "attention": True},
    # The balance loss belongs to each rank's own rows, so with it world sizes differ by intent.
    "msn_smoe": RANKMIXER | {"block": "msn_smoe", "layers": 1, "balance_weight": 0.0},
    "dlrm": {"backbone": "dlrm", "hidden": [16], "tokens": 2, "width": 16, "embedding_dim": 8},
}


def write_data(folder: Path) -> None:
    """schema.yaml, and one file a split."""
    folder.mkdir()
    write_schema(folder, SCHEMA)
    for split, sizes in ROW_GROUPS.items():
        write_split(folder / split, table(sum(sizes), seed=len(split)), sizes)


def write_split(folder: Path, table: pa.Table, row_groups: list[int]) -> None:
    """One file with row groups of these sizes, in place of what was there."""
    folder.mkdir(exist_ok=True)
    with pq.ParquetWriter(folder / "part-0.parquet", table.schema) as file:
        for start, size in zip(np.cumsum([0, *row_groups[:-1]]), row_groups, strict=True):
            file.write_table(table.slice(start, size))


def table(rows: int, seed: int) -> pa.Table:
    """Views depend on user and item; one row in five has no like label."""
    rng = np.random.default_rng(seed)
    users, items = rng.integers(40, size=rows), rng.integers(30, size=rows)
    likes = rng.random(rows) < 0.3
    return pa.table(
        {
            "user": users,
            "item": items,
            "past_items": [rng.integers(30, size=rng.integers(6)) for _ in range(rows)],
            "age": rng.random(rows).astype(np.float32),
            "view": ((users + items + rng.integers(3, size=rows)) % 5 < 2).astype(np.float32),
            "like": pa.array(likes.astype(np.float32), mask=rng.random(rows) < 0.2),
        }
    )


def config_of(data: Path, model: str, **changes: Any) -> RunConfig:
    """A run of six steps of one of MODELS."""
    tree = {
        "name": model,
        "seed": 5,
        "data": {"path": str(data), "batch_size": 40},
        "model": MODELS[model],
        "memory": MEMORY,
        "optimizer": {"ids": {"init_std": 0.1, "decay": 0.001}, "warmup_steps": 2},
        "training": {"device": "cpu", "max_steps": 6},  # one schedule, however many steps an epoch takes
    }
    return RunConfig.model_validate(tree | changes)
