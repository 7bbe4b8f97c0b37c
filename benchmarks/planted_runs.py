"""Training runs on the planted set, for the benchmarks that need some."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from msn_dist.config import load_config
from msn_dist.data import synthetic
from msn_dist.training import run

CONFIG = Path(__file__).parent.parent / "configs" / "planted.yaml"
THREADS = 2


def prepare() -> dict[str, Any]:
    """Write the set that configs/planted.yaml reads; returns its planted.json."""
    torch.set_num_threads(THREADS)
    folder = Path(load_config(CONFIG).data.path)
    synthetic.prepare(folder)
    return json.loads((folder / "planted.json").read_text())


def summary_of(overrides: Sequence[str]) -> dict[str, Any]:
    """summary.json of a run of configs/planted.yaml with `overrides`, made in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run.train(load_config(CONFIG, list(overrides)), Path(folder) / "run")
        return json.loads((Path(folder) / "run" / "summary.json").read_text())
