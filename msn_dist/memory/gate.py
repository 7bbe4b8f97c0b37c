"""How the retrieved vector acts on the token."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Gate(nn.Module):
    """x~ = x * f(v), with f one of tanh, 1 + tanh, sigmoid, identity; or a projection of [x, v].

    `value_dim` other than `width` adds a projection of v to the token's width first.
    """

    def __init__(self, kind: str, width: int, value_dim: int) -> None:
        super().__init__()
        self.kind = kind
        self.project = nn.Identity() if value_dim == width else nn.Linear(value_dim, width, bias=False)
        self.merge = nn.Linear(2 * width, width) if kind == "concat" else None

    def forward(self, x_BTD: Tensor, v_BTV: Tensor) -> Tensor:
        """The gated token, shaped and typed like x_BTD."""
        v_BTD = self.project(v_BTV.to(x_BTD.dtype))
        match self.kind:
            case "tanh":
                return x_BTD * torch.tanh(v_BTD)
            case "one_plus_tanh":
                return x_BTD * (1 + torch.tanh(v_BTD))
            case "sigmoid":
                return x_BTD * torch.sigmoid(v_BTD)
            case "linear":
                return x_BTD * v_BTD
            case "concat":
                return self.merge(torch.cat([x_BTD, v_BTD], dim=-1))
        raise ValueError(f"gate {self.kind!r} is not one of tanh, one_plus_tanh, sigmoid, linear, concat")
