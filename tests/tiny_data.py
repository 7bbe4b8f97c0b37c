"""A small data set in the format that training reads: two labels, a history, row groups of different sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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
