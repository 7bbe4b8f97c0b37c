"""Per-task losses that know which labels are there."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def task_losses(logits_BK: Tensor, labels_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy per task, summed over the rows that have that label (NaN: no label).

    Returns sums_K and counts_K, float32, of this rank's rows only.  The mean over the global batch is the sum over
    ranks of sums_K divided by that of counts_K; where gradients are averaged over W ranks, a rank therefore
    back-propagates W * sums_K / global_counts_K.
    """
    present_BK = ~labels_BK.isnan()
    known_BK = torch.where(present_BK, labels_BK, 0.0)
    loss_BK = functional.binary_cross_entropy_with_logits(logits_BK.float(), known_BK, reduction="none")
    return torch.where(present_BK, loss_BK, 0.0).sum(0), present_BK.sum(0).float()
