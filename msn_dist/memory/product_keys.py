"""Product keys: which k of N * N slots a query reads, and with what weights (DESIGN section 1).

Two small sets of N sub-keys stand for n = N * N keys: slot r = I * N + J scores
s_row[I] + s_col[J], so its top-k comes from the top-k of each axis, at a cost of 2 N instead of N^2.

The search itself has two back ends that are given the same operands: `kernels.reference`, and Triton kernels.

Row and column have queries, sub-keys and norms of their own, in one tensor each: every operator of a step, and every
parameter, costs the host of a GPU as long as a small kernel takes.

Shape suffixes: B samples, T tokens, D model width, H heads, E key width of one half (d_k), N sub-keys per axis,
K slots read, M = B * T queries of a head, A = 2 axes (row, column), X = A * H * E.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from msn_dist.config import MemoryConfig
from msn_dist.errors import InputError
from msn_dist.kernels import reference, sizes
from msn_dist.kernels.support import interpreted, why_no_triton
from msn_dist.memory.autocast import autocast_dtype


class AxisNorm(nn.Module):
    """LayerNorm over E, with a gamma and a beta for each axis."""

    eps = 1e-5

    def __init__(self, key_dim: int) -> None:
        super().__init__()
        self.gamma_AE = nn.Parameter(torch.empty(2, key_dim))
        self.beta_AE = nn.Parameter(torch.empty(2, key_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gamma_AE)
        nn.init.zeros_(self.beta_AE)

    def forward(self, x: Tensor, between: int) -> Tensor:
        """x of shape [..., A, (`between` dimensions), E], normalised."""
        shape = 2, *[1] * between, -1
        xhat = functional.layer_norm(x, x.shape[-1:], eps=self.eps)
        return torch.addcmul(self.beta_AE.view(shape), xhat, self.gamma_AE.view(shape))


class ProductKeys(nn.Module):
    """The retrieval: tokens -> slots and weights.

    The score of a sub-key is s = LN(W x) . LN(Theta C)^T * tau.  The codes C over-parameterize the keys: through Theta,
    sub-keys that no query selected still move (as in SimVQ), which keeps the memory in use.
    """

    def __init__(self, config: MemoryConfig, width: int) -> None:
        super().__init__()
        self.top_k, self.heads = config.top_k, config.heads
        self.retrieval = config.retrieval
        self.tau = config.tau if config.tau is not None else config.key_dim**-0.5
        self.query_XD = nn.Parameter(torch.empty(2 * config.heads * config.key_dim, width))
        self.codes_AHNE = nn.Parameter(torch.empty(2, config.heads, config.sub_keys, config.key_dim))
        self.mix = config.theta == "mix"
        mixed = config.sub_keys if self.mix else config.key_dim
        theta = None if config.theta == "none" else nn.Parameter(torch.empty(2, config.heads, mixed, mixed))
        self.register_parameter("theta", theta)
        self.query_norm = AxisNorm(config.key_dim) if config.layer_norm else None
        self.key_norm = AxisNorm(config.key_dim) if config.layer_norm else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """W as that of nn.Linear, normal codes, Theta = 1: the keys start as their codes."""
        for query_XD, codes_HNE in zip(self.query_XD.chunk(2), self.codes_AHNE, strict=True):
            nn.init.kaiming_uniform_(query_XD, a=math.sqrt(5))
            nn.init.normal_(codes_HNE)
        if self.theta is not None:
            self.theta.copy_(torch.eye(self.theta.shape[-1]))

    def keys(self) -> Tensor:
        """keys_AHNE: the same for every row, so computed once per step and constant when serving."""
        keys_AHNE = self.codes_AHNE
        if self.theta is not None:
            keys_AHNE = self.theta @ keys_AHNE if self.mix else keys_AHNE @ self.theta.transpose(-1, -2)
        return keys_AHNE if self.key_norm is None else self.key_norm(keys_AHNE, between=2)

    def queries(self, x_BTD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """queries_BTHE = LN(W x) of the row and of the column axis, in `dtype`."""
        both_BTX = functional.linear(x_BTD, self.query_XD)
        fused = self.fused_norm(both_BTX)
        if fused is None:
            both_BTAHE = both_BTX.unflatten(-1, (2, self.heads, -1))
            if self.query_norm is not None:
                both_BTAHE = self.query_norm(both_BTAHE, between=1)
            return both_BTAHE.to(dtype).unbind(2)
        norm = self.query_norm
        row_MHE, col_MHE = fused(both_BTX.flatten(0, 1), norm.gamma_AE, norm.beta_AE, norm.eps, dtype)
        return row_MHE.unflatten(0, x_BTD.shape[:2]), col_MHE.unflatten(0, x_BTD.shape[:2])

    def scores(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """scores_BTHN of either axis in float32 at least, by the formula: the truth, which a retrieval never builds."""
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        queries = self.queries(x_BTD, dtype)
        with torch.autocast(x_BTD.device.type, enabled=False):
            row_BTHN, col_BTHN = (
                torch.einsum("bthe,hne->bthn", queries_BTHE, keys_HNE.to(dtype)) * self.tau
                for queries_BTHE, keys_HNE in zip(queries, self.keys(), strict=True)
            )
        return row_BTHN, col_BTHN

    def fused_norm(self, both_BTX: Tensor) -> Callable[..., tuple[Tensor, Tensor]] | None:
        """`kernels.query_norm.query_norm` on a GPU that the kernels run on, else None: LayerNorm by torch."""
        norm = self.query_norm
        # compiled, the plain formula becomes one kernel by itself; the kernels have no float64
        plain = torch.compiler.is_compiling() or not both_BTX.is_cuda or both_BTX.dtype == torch.float64
        if plain or norm is None or norm.gamma_AE.dtype != torch.float32:
            return None
        if interpreted() or why_no_triton(both_BTX.device):
            return None
        from msn_dist.kernels.query_norm import query_norm

        return query_norm if norm.gamma_AE.shape[1] <= sizes.NORM_WIDTH else None

    def back_end(self, device: torch.device) -> str:
        """What `choose_retrieval` makes of the configuration."""
        return choose_retrieval(self.retrieval, device.type, self.top_k, *self.codes_AHNE.shape[2:])

    def search(self, back_end: str) -> Callable[..., tuple[Tensor, Tensor]]:
        """`kernels.reference.retrieve`, or the same by the kernels."""
        if back_end == "reference":
            return reference.retrieve
        from msn_dist.kernels.ops import retrieve

        return retrieve

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """slots_BTHK (int64 in [0, N * N), best first) and weights_BTHK (float32 at least, softmax over K).

        Products are of float32 operands, or of 16 bits under autocast, and are added up in float32: sums of
        16 bits would tie.
        """
        device = x_BTD.device.type
        back_end = self.back_end(x_BTD.device)
        # the kernels have no float64
        exact = torch.float32 if back_end == "triton" else torch.promote_types(x_BTD.dtype, torch.float32)
        dtype = autocast_dtype(device) or exact
        queries = (queries_BTHE.flatten(0, 1) for queries_BTHE in self.queries(x_BTD, dtype))
        with torch.autocast(device, enabled=False):  # keys are few: casts would cost more than products of 32 bits
            row_HNE, col_HNE = self.keys().to(dtype)
            slots_MHK, weights_MHK = self.search(back_end)(*queries, row_HNE, col_HNE, self.top_k, self.tau)
        shape_BT = x_BTD.shape[:2]
        return slots_MHK.unflatten(0, shape_BT), weights_MHK.unflatten(0, shape_BT)


@torch.compiler.assume_constant_result  # a graph is compiled for one device and one setting
def choose_retrieval(kind: str, device: str, top_k: int, sub_keys: int, key_dim: int) -> str:
    """Which back end retrieves on a device of this type, "triton" or "reference"; `kind` is one of them or "auto".

    auto is triton on a GPU that the kernels run on and for sizes that they take, else reference.
    Raises InputError if `kind` cannot run here.
    """
    if kind == "reference" or (kind == "auto" and (device != "cuda" or interpreted())):
        return "reference"
    reason = why_no_triton(device) or sizes.why_no_retrieval(top_k, sub_keys, key_dim)
    if reason is None:
        return "triton"
    if kind == "auto":
        return "reference"
    raise InputError(f"memory.retrieval=triton: {reason}; set memory.retrieval to auto or reference")
