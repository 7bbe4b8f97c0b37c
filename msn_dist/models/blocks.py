"""The per-token networks of a RankMixer layer: every token has weights of its own.

Each maps tokens to (tokens, balance): [B, T, D] -> ([B, T, D], scalar).  `balance` is the loss that keeps
experts evenly used, 0 where there are none.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from msn_dist.models.linear import PerTokenLinear

OUTPUT_GAIN = 0.5  # a residual branch starts smaller than what it is added to


class FFN(nn.Module):
    """W_2 GELU(W_1 x), hidden width H."""

    def __init__(self, tokens: int, width: int, hidden: int):
        super().__init__()
        self.up = PerTokenLinear(tokens, width, hidden)
        self.down = PerTokenLinear(tokens, hidden, width, gain=OUTPUT_GAIN)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        return self.down(functional.gelu(self.up(x_BTD))), x_BTD.new_zeros(())


class GatedFFN(nn.Module):
    """SwiGLU, W_2 (SiLU(W_g x) * W_1 x), with two thirds of the hidden width: as many weights as FFN."""

    def __init__(self, tokens: int, width: int, hidden: int):
        super().__init__()
        hidden = max(1, round(hidden * 2 / 3))
        self.gate = PerTokenLinear(tokens, width, hidden)
        self.up = PerTokenLinear(tokens, width, hidden)
        self.down = PerTokenLinear(tokens, hidden, width, gain=OUTPUT_GAIN)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        hidden_BTH = functional.silu(self.gate(x_BTD)) * self.up(x_BTD)
        return self.down(hidden_BTH), x_BTD.new_zeros(())
