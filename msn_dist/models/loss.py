"""Per-task losses that know which labels are there."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def task_losses(logits_BK: Tensor, labels_BK: Tensor) -> Tensor:
    """Binary cross-entropy per task, summed over this rank's rows that have that label (NaN: no label).

    Returns sums_K, float32.  The loss of a step is their sum over ranks and tasks, divided by the rows of the
    global batch: a task counts in proportion to the rows that have its label.
    """
    present_BK = ~labels_BK.isnan()
    known_BK = torch.where(present_BK, labels_BK, 0.0)
    loss_BK = functional.binary_cross_entropy_with_logits(logits_BK.float(), known_BK, reduction="none")
    return torch.where(present_BK, loss_BK, 0.0).sum(0)
