"""Long-format CSV files, one row a measurement, with the conditions it was made under."""

from __future__ import annotations

import csv
import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from msn_dist.training.run_directory import versions

FOLDER = Path(__file__).parent / "results"


def write_rows(name: str, rows: Sequence[dict[str, Any]]) -> Path:
    """Replace results/`name` and print the rows; all rows have the same keys."""
    conditions = {
        "device": device(),
        "threads": torch.get_num_threads(),
        **versions(),
        "date": date.today().isoformat(),
    }
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / name
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *conditions])
        writer.writeheader()
        for row in rows:
            writer.writerow({key: _short(value) for key, value in {**row, **conditions}.items()})
            print("  ".join(f"{key} {_short(value)}" for key, value in row.items()))
    return path


def device() -> str:
    """The GPU's name, or the processor's architecture."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"


def _short(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value
