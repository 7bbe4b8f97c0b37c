"""Training runs on the planted set, for the benchmarks that need some."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msn_dist.config import load_config
from msn_dist.data import synthetic
from msn_dist.training import run

CONFIG = Path(__file__).parents[1] / "configs" / "planted.yaml"


def prepare() -> dict[str, Any]:
    """Write the set that configs/planted.yaml reads, if it is not there; returns its planted.json."""
    folder = Path(load_config(CONFIG).data.path)
    synthetic.prepare(folder)
    return json.loads((folder / "planted.json").read_text())


def summary_of(overrides: Sequence[str]) -> dict[str, Any]:
    """summary.json of a run of configs/planted.yaml with `overrides`; the run directory does not stay."""
    print("planted", *overrides, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            run.train(load_config(CONFIG, list(overrides)), Path(folder) / "run")
        return json.loads((Path(folder) / "run" / "summary.json").read_text())
