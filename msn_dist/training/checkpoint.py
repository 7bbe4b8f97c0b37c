"""Checkpoints by torch.distributed.checkpoint: written by all ranks, readable at any world size."""

from __future__ import annotations

import logging
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torchrec.distributed.model_parallel import DistributedModelParallel

from msn_dist.training.optimizers import Optimizers
from msn_dist.training.ranks import Ranks

# "... is_distributed ... no_dist": the planner's remarks on every save
logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)


def save_checkpoint(path: Path, model: DistributedModelParallel, optimizers: Optimizers, ranks: Ranks) -> None:
    """Write model, fused and dense optimizer state; a collective call that replaces what `path` held."""
    state = {
        "model": model.state_dict(),
        "fused_optimizer": model.fused_optimizer.state_dict(),
        "dense_optimizer": optimizers.dense.state_dict(),
    }
    dcp.save(state, checkpoint_id=path, process_group=ranks.control)


def load_model(path: Path, model: DistributedModelParallel, ranks: Ranks) -> None:
    """Read the model's parameters, saved at any world size; a collective call."""
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=path, process_group=ranks.control)
    model.load_state_dict(state["model"])
