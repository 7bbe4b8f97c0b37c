"""How a run has used its slots: memory_usage.json, as plans count with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msn_dist.errors import InputError


def read_usage(run: Path) -> dict[str, Any]:
    """The layer with the most uneven use, of a finished run; InputError names the run."""
    try:
        layers = json.loads((run / "memory_usage.json").read_text(encoding="utf-8"))
        return max(layers.values(), key=lambda layer: float(hit_curve(layer)[1][1]))
    except InputError as error:
        raise InputError(f"--usage {run}: {error}") from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise InputError(f"--usage {run}: no memory_usage.json of a finished run with a memory in it") from None


def hit_curve(layer: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Shares of the slots, and of all hits on them [X], float64; InputError if it has none."""
    try:
        curve = layer["rank_curve"]
        names = ("share_of_slots", "share_of_hits")
        points_2X = torch.stack([torch.tensor(curve[name], dtype=torch.float64) for name in names])
        ascend = bool((points_2X[:, 0] == 0).all() and (points_2X.diff() >= 0).all())  # not with NaN
        of_slots, of_hits = points_2X[:, -1].tolist()
        right = ascend and 0 < of_slots <= 1 and abs(of_hits - 1) < 1e-3
    except (IndexError, KeyError, TypeError, ValueError, RuntimeError):
        right = False
    if not right:
        raise InputError(
            "memory_usage.json: rank_curve must hold share_of_slots and share_of_hits, as many points of each, which "
            "ascend from 0 to at most 1, and to 1; take the file of a finished run whose last interval had hits"
        )
    return points_2X[0], points_2X[1]
