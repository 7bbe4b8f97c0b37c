"""Target attention: what the candidate item finds in a user's history (DIN, arXiv 1706.06978).

Shape suffixes: B rows, N events of all rows one after the other, F width of an event and of the target.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TargetAttention(nn.Module):
    """Weighted mean of each row's events: target [B, F], events [N, F], lengths [B] summing to N -> [B, F].

    A small network scores an event e against the row's target q from [q, e, q - e, q * e].  Scores go through a
    softmax over the row's events (DIN sums raw scores; a softmax starts as the mean and does not grow with the
    length).  A row without events gives 0.  Lists stay jagged, so short histories cost little.
    """

    def __init__(self, width: int, hidden: int = 32):
        super().__init__()
        # a softmax takes out what all scores have in common: a bias of the last layer would be rounding errors alone
        self.score = nn.Sequential(nn.Linear(4 * width, hidden), nn.GELU(), nn.Linear(hidden, 1, bias=False))

    def forward(self, target_BF: Tensor, events_NF: Tensor, lengths_B: Tensor) -> Tensor:
        row_N = rows_of_events(lengths_B, events_NF.shape[0])
        target_NF = target_BF.index_select(0, row_N)
        pair_N4F = torch.cat([target_NF, events_NF, target_NF - events_NF, target_NF * events_NF], 1)
        score_N = self.score(pair_N4F).squeeze(1).float()
        top_B = torch.full_like(target_BF[:, 0], -torch.inf, dtype=torch.float32)
        top_B = top_B.scatter_reduce(0, row_N, score_N.detach(), "amax")
        weight_N = (score_N - top_B.index_select(0, row_N)).exp()
        total_B = torch.zeros_like(top_B).index_add(0, row_N, weight_N)
        weight_N = weight_N / total_B.index_select(0, row_N)
        return sum_of_lists(weight_N.unsqueeze(1) * events_NF, lengths_B)


@torch.fx.wrap
def rows_of_events(lengths_B: Tensor, events: int) -> Tensor:
    """The row of every event: [N] int64.  Told how many there are, torch need not ask the device."""
    return torch.arange(lengths_B.shape[0], device=lengths_B.device).repeat_interleave(lengths_B, output_size=events)


def sum_of_lists(values_NF: Tensor, lengths_B: Tensor) -> Tensor:
    """Sum over each row's events: [B, F]."""
    sums_BF = values_NF.new_zeros(lengths_B.shape[0], values_NF.shape[1])
    return sums_BF.index_add(0, rows_of_events(lengths_B, values_NF.shape[0]), values_NF)
