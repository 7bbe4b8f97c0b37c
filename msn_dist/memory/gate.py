"""How the retrieved vector acts on the token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from msn_dist.kernels import reference
from msn_dist.kernels.support import interpreted, why_no_triton
from msn_dist.memory.autocast import autocast_dtype


class Gate(nn.Module):
    """x~ = x * f(v), with f one of tanh, 1 + tanh, sigmoid, identity; or a projection of [x, v].

    `value_dim` other than `width` adds a projection of v to the token's width first.
    """

    def __init__(self, kind: str, width: int, value_dim: int) -> None:
        super().__init__()
        self.kind = kind
        self.project = None if value_dim == width else nn.Linear(value_dim, width, bias=False)
        self.merge = nn.Linear(2 * width, width) if kind == "concat" else None

    def forward(self, x_BTD: Tensor, v_BTV: Tensor) -> Tensor:
        """The gated token, shaped like x_BTD and typed as it, or as autocast types products: the network's are next."""
        dtype = autocast_dtype(x_BTD.device.type) or x_BTD.dtype
        v_BTD = v_BTV if self.project is None else self.project(v_BTV.to(dtype))
        if self.merge is not None:
            return self.merge(torch.cat([x_BTD, v_BTD.to(x_BTD.dtype)], dim=-1))
        return self.product(x_BTD)(x_BTD, v_BTD, self.kind, dtype)

    def product(self, x_BTD: Tensor) -> Callable[[Tensor, Tensor, str, torch.dtype], Tensor]:
        """`kernels.reference.gate`, or the same in one pass on a GPU that the kernels run on."""
        # compiled, the plain formula becomes one kernel by itself; the kernels have no float64
        plain = torch.compiler.is_compiling() or not x_BTD.is_cuda or x_BTD.dtype == torch.float64
        if plain or interpreted() or why_no_triton(x_BTD.device):
            return reference.gate
        from msn_dist.kernels.gate import gate

        return gate
