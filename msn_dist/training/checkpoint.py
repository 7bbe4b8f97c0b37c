"""Checkpoints by torch.distributed.checkpoint: written by all ranks, readable at any world size."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torchrec.distributed.model_parallel import DistributedModelParallel

from msn_dist.training.optimizers import Optimizers
from msn_dist.training.ranks import Ranks


def save_checkpoint(path: Path, model: DistributedModelParallel, optimizers: Optimizers, ranks: Ranks) -> None:
    """Write model, fused and dense optimizer state to `path`, a folder that all ranks see; a collective call.

    What `path` held is replaced only when the new state is complete.
    """
    state = {
        "model": model.state_dict(),
        "fused_optimizer": model.fused_optimizer.state_dict(),
        "dense_optimizer": optimizers.dense.state_dict(),
    }
    draft = path.with_name(path.name + ".draft")
    if ranks.rank == 0:
        shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed
    dist.barrier(group=ranks.control)
    dcp.save(state, checkpoint_id=draft, process_group=ranks.control)
    if ranks.rank == 0:
        old = path.with_name(path.name + ".old")
        if path.exists():
            path.rename(old)
        draft.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    dist.barrier(group=ranks.control)


def load_model(path: Path, model: DistributedModelParallel, ranks: Ranks) -> None:
    """Read the model's parameters, saved at any world size; a collective call."""
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=path, process_group=ranks.control)
    model.load_state_dict(state["model"])
