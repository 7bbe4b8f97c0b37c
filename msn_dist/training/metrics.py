"""Ranking metrics over all rows of all ranks, computed exactly in float64.

Shape suffixes: B rows of one step and rank, R rows of an evaluation, K tasks, G groups.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from msn_dist.errors import Diverged, InputError

METRICS = ("auc", "gauc", "qauc", "logloss", "ne", "calibration", "groups", "rows")
COUNTS = ("groups", "rows")


class RankingMetrics:
    """AUC, GAUC, QAUC, logloss, normalised entropy and calibration of each task in one evaluation.

    `group` is a process group that carries CPU tensors (gloo); None is the default group, or this process
    alone where torch.distributed is not initialised.  Rows are kept on the CPU: 8 * (K + 1) bytes each.
    """

    def __init__(self, tasks: list[str], group: dist.ProcessGroup | None = None) -> None:
        self._tasks = tasks
        self._group = group
        self._logits: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._groups: list[Tensor] = []

    def update(self, logits_BK: Tensor, labels_BK: Tensor, groups_B: Tensor) -> None:
        """Add the rows of one step: any float logits; labels 0, 1 or NaN (no label); integer groups; B may be 0."""
        self._logits.append(logits_BK.detach().float().cpu())
        self._labels.append(labels_BK.detach().float().cpu())
        self._groups.append(groups_B.detach().long().cpu())

    def compute(self) -> dict[str, dict[str, float | int]]:
        """Metrics of every task, the same on every rank; a collective call over `group`.

        A metric that is undefined (one class only, no rows) is NaN.  Raises Diverged on every rank if a logit
        is not finite, InputError if a label is neither 0, 1 nor NaN.
        """
        empty = torch.empty(0, len(self._tasks))
        logits_RK = torch.cat([empty, *self._logits])
        labels_RK = torch.cat([empty, *self._labels])
        groups_R = torch.cat([torch.empty(0, dtype=torch.int64), *self._groups])
        lengths = self._check(logits_RK, labels_RK)

        # Rank 0 computes and tells the others: no rank but it holds all rows, and all see the same bits.
        logits_RK, labels_RK, groups_R = (self._collect(rows, lengths) for rows in (logits_RK, labels_RK, groups_R))
        if self._rank == 0:
            columns = zip(logits_RK.unbind(1), labels_RK.unbind(1), strict=True)
            rows = [_task_metrics(logits_R, labels_R, groups_R) for logits_R, labels_R in columns]
            metrics = torch.tensor([[row[name] for name in METRICS] for row in rows], dtype=torch.float64)
        else:
            metrics = torch.empty(len(self._tasks), len(METRICS), dtype=torch.float64)
        if dist.is_initialized():
            dist.broadcast(metrics, group=self._group, group_src=0)
        return {
            task: {name: int(value) if name in COUNTS else value for name, value in zip(METRICS, row, strict=True)}
            for task, row in zip(self._tasks, metrics.tolist(), strict=True)
        }

    @property
    def _rank(self) -> int:
        return dist.get_rank(self._group) if dist.is_initialized() else 0

    def _check(self, logits_RK: Tensor, labels_RK: Tensor) -> list[int]:
        """Rows of each rank, after a check of all ranks' values that raises on all of them or on none."""
        bad_logits_R = ~logits_RK.isfinite().all(1)
        bad_labels_RK = ~(labels_RK.isnan() | (labels_RK == 0) | (labels_RK == 1))
        bad_steps = sum(not logits_BK.isfinite().all() for logits_BK in self._logits)
        mine = torch.tensor([len(logits_RK), len(self._logits), bad_steps, bad_logits_R.sum(), *bad_labels_RK.sum(0)])
        every = [mine]
        if dist.is_initialized():
            every = [torch.empty_like(mine) for _ in range(dist.get_world_size(self._group))]
            dist.all_gather(every, mine, group=self._group)
        rows, steps, bad_steps, bad_rows, *bad_labels = torch.stack(every).sum(0).tolist()
        if bad_rows:
            raise Diverged(
                f"the model has diverged: logits of {bad_rows:,} of {rows:,} rows are NaN or infinite, in "
                f"{bad_steps:,} of {steps:,} evaluation steps; lower the learning rates or raise optimizer.warmup_steps"
            )
        for task, bad in zip(self._tasks, bad_labels, strict=True):
            if bad:
                raise InputError(f"label {task!r}: {bad:,} of {rows:,} rows hold a value other than 0 and 1")
        return [counts[0].item() for counts in every]

    def _collect(self, rows: Tensor, lengths: list[int]) -> Tensor:
        """The rows of all ranks on rank 0, in rank order; unchanged elsewhere."""
        if not dist.is_initialized() or max(lengths) == 0:
            return rows
        padded = F.pad(rows, [0, 0] * (rows.dim() - 1) + [0, max(lengths) - len(rows)])  # gloo wants equal lengths
        parts = [torch.empty_like(padded) for _ in lengths] if self._rank == 0 else None
        dist.gather(padded, parts, group=self._group, group_dst=0)
        return rows if parts is None else torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])


def grouped_auc(scores_R: Tensor, labels_R: Tensor, groups_R: Tensor) -> tuple[Tensor, Tensor]:
    """Exact AUC within each group that holds both labels, and the rows of those groups: float64 [G], int64 [G].

    labels_R is bool.  Equal scores count one half, as in the Mann-Whitney statistic: an AUC is the mean rank of the
    positives, shifted and scaled, where tied rows share the mean of their ranks.
    """
    order_R = torch.argsort(scores_R, stable=True)
    order_R = order_R[torch.argsort(groups_R[order_R], stable=True)]
    scores_R, labels_R, groups_R = scores_R[order_R], labels_R[order_R], groups_R[order_R]

    _, group_of_R, rows_G = groups_R.unique_consecutive(return_inverse=True, return_counts=True)
    new_R = torch.ones_like(labels_R)
    new_R[1:] = (groups_R[1:] != groups_R[:-1]) | (scores_R[1:] != scores_R[:-1])
    tie_of_R = new_R.cumsum(0) - 1
    size_of_tie = tie_of_R.bincount().double()
    rank_of_tie = size_of_tie.cumsum(0) - (size_of_tie - 1) / 2  # 1-based, over all rows

    starts_G = rows_G.cumsum(0) - rows_G
    ranks_R = rank_of_tie[tie_of_R] - starts_G[group_of_R]
    zeros_G = torch.zeros(len(rows_G), dtype=torch.float64)
    positives_G = zeros_G.index_add(0, group_of_R, labels_R.double())
    rank_sums_G = zeros_G.index_add(0, group_of_R, ranks_R * labels_R)
    negatives_G = rows_G - positives_G
    both_G = (positives_G > 0) & (negatives_G > 0)
    wins_G = rank_sums_G - positives_G * (positives_G + 1) / 2
    return (wins_G / (positives_G * negatives_G))[both_G], rows_G[both_G]


def _task_metrics(logits_R: Tensor, labels_R: Tensor, groups_R: Tensor) -> dict[str, float | int]:
    labelled_R = ~labels_R.isnan()
    logits_R, labels_R, groups_R = logits_R[labelled_R].double(), labels_R[labelled_R].double(), groups_R[labelled_R]
    positive_R = labels_R == 1
    auc, _ = grouped_auc(logits_R, positive_R, torch.zeros_like(groups_R))
    auc_G, rows_G = grouped_auc(logits_R, positive_R, groups_R)

    logloss = F.binary_cross_entropy_with_logits(logits_R, labels_R)
    rate = labels_R.mean()
    entropy = F.binary_cross_entropy(rate, rate) if 0 < rate < 1 else torch.nan  # of a constant prediction of the rate
    clicked = labels_R.sum()
    return {
        "auc": auc.mean().item(),  # of the one group, or NaN of none
        "gauc": ((auc_G * rows_G).sum() / rows_G.sum()).item(),
        "qauc": auc_G.mean().item(),
        "logloss": logloss.item(),
        "ne": (logloss / entropy).item(),
        "calibration": (logits_R.sigmoid().sum() / clicked).item() if clicked > 0 else torch.nan,
        "groups": len(auc_G),
        "rows": len(labels_R),
    }
