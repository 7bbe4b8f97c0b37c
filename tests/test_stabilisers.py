"""LayerNorm, warm-up and over-parameterized keys keep a memory in use; without them it collapses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from msn_dist.config import load_config
from msn_dist.data import synthetic
from msn_dist.training import run

CONFIG = Path(__file__).parents[1] / "configs" / "planted.yaml"
SMALLER = [
    "data.batch_size=512",
    "memory.sub_keys=32",
    "optimizer.warmup_steps=350",
    "training.log_every=196",  # a window is one epoch
    "training.device=cpu",
]
NONE = ["memory.layer_norm=false", "memory.theta=none", "optimizer.warmup_steps=0"]


@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")  # a better epoch replaces it, as it should
def test_without_stabilisers_few_slots_are_used_and_with_all_nearly_every_one(tmp_path):
    synthetic.prepare(tmp_path / "data", rows=100_000, users=5_000, items=3_500, clusters=32, zipf=0.5)
    used = {}
    for name, overrides in (("full", []), ("none", NONE)):
        config = load_config(CONFIG, [f"data.path={tmp_path / 'data'}", *SMALLER, *overrides])
        run.train(config, tmp_path / name)
        used[name] = json.loads((tmp_path / name / "summary.json").read_text())["memory"]
    assert used["full"]["used_share"] > 0.9 and used["full"]["window_used_share"] > 0.8
    assert used["none"]["window_used_share"] < 0.5 * used["full"]["window_used_share"]
    assert used["none"]["entropy_ratio"] < used["full"]["entropy_ratio"]
