"""A linear map of its own for every token.

Shape suffixes: B rows, T tokens, I input width, O output width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PerTokenLinear(nn.Module):
    """y[b, t] = x[b, t] @ weight[t] + bias[t]: [B, T, I] -> [B, T, O].

    Weights are drawn from a normal of std gain / sqrt(I), cut at two std; the bias starts at 0.
    """

    def __init__(self, tokens: int, in_width: int, out_width: int, *, gain: float = 1.0):
        super().__init__()
        self.weight_TIO = nn.Parameter(trunc_normal(tokens, in_width, out_width, gain=gain))
        self.bias_TO = nn.Parameter(torch.zeros(tokens, out_width))

    def forward(self, x_BTI: Tensor) -> Tensor:
        return batched_linear(x_BTI.transpose(0, 1), self.weight_TIO, self.bias_TO).transpose(0, 1)


def batched_linear(x_GBI: Tensor, weight_GIO: Tensor, bias_GO: Tensor) -> Tensor:
    """One linear map per group: [G, B, I] -> [G, B, O]."""
    return torch.baddbmm(bias_GO.unsqueeze(1), x_GBI, weight_GIO)


def trunc_normal(groups: int, in_width: int, out_width: int, *, gain: float = 1.0) -> Tensor:
    """[groups, in_width, out_width] of std gain / sqrt(in_width), cut at two std."""
    std = gain * in_width**-0.5
    return nn.init.trunc_normal_(torch.empty(groups, in_width, out_width), std=std, a=-2 * std, b=2 * std)
