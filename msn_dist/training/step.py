"""One training step."""

from __future__ import annotations

from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from msn_dist.data.batch import Batch
from msn_dist.models.loss import task_losses
from msn_dist.training.evaluation import autocast
from msn_dist.training.optimizers import Optimizers


def train_step(
    model: DistributedModelParallel, optimizers: Optimizers, batch: Batch, rows: int, world: int, precision: str
) -> Tensor:
    """Forward, backward with the update of all tables, step of the rest; returns this rank's summed loss.

    The loss is the mean over the global batch: its `rows` rows divide the sums of all `world` ranks, and since
    DistributedDataParallel averages gradients over ranks, each rank's share is scaled by W.
    """
    with autocast(batch.groups_B.device, precision):
        output = model(batch)
    sums_K = task_losses(output.logits_BK, batch.labels_BK)
    loss = (sums_K.sum() + output.auxiliary * len(batch)) * (world / rows)
    optimizers.zero_grad()
    loss.backward()
    optimizers.step()
    return sums_K.detach().sum()
