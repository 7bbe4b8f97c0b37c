"""Product keys: which k of N * N slots a query reads, and with what weights (DESIGN section 1).

Two small sets of N sub-keys stand for n = N * N keys: slot r = I * N + J scores
s_row[I] + s_col[J], so its top-k comes from the top-k of each axis, at a cost of 2 N instead of N^2.

The search itself has two back ends that are given the same operands: `kernels.reference`, and Triton kernels.

Shape suffixes: B samples, T tokens, D model width, H heads, E key width of one half (d_k),
N sub-keys per axis, K slots read, M = B * T queries of a head, A = 2 axes, X = H * E of one axis or of both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from msn_dist.config import MemoryConfig
from msn_dist.errors import InputError
from msn_dist.kernels import reference, sizes
from msn_dist.kernels.support import interpreted, why_no_triton
from msn_dist.memory.autocast import autocast_dtype


class KeyAxis(nn.Module):
    """Queries and the N sub-keys of one axis, which score

    s = LN(W x) . LN(Theta C)^T * tau.  The codes C over-parameterize the keys: through Theta,
    sub-keys that no query selected still move (as in SimVQ), which keeps the memory in use.
    """

    def __init__(self, config: MemoryConfig, width: int) -> None:
        super().__init__()
        heads, sub_keys, key_dim = config.heads, config.sub_keys, config.key_dim
        self.tau = config.tau if config.tau is not None else key_dim**-0.5
        self.heads = heads
        self.query = nn.Linear(width, heads * key_dim, bias=False)
        self.codes_HNE = nn.Parameter(torch.empty(heads, sub_keys, key_dim))
        self.mix = config.theta == "mix"
        mixed = sub_keys if self.mix else key_dim
        theta = None if config.theta == "none" else nn.Parameter(torch.empty(heads, mixed, mixed))
        self.register_parameter("theta", theta)
        self.query_norm = nn.LayerNorm(key_dim) if config.layer_norm else nn.Identity()
        self.key_norm = nn.LayerNorm(key_dim) if config.layer_norm else nn.Identity()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal codes, Theta = 1: the keys start as their codes."""
        nn.init.normal_(self.codes_HNE)
        if self.theta is not None:
            self.theta.copy_(torch.eye(self.theta.shape[-1]))

    def keys(self) -> Tensor:
        """keys_HNE: the same for every row, so computed once per step and constant when serving."""
        keys_HNE = self.codes_HNE
        if self.theta is not None:
            keys_HNE = self.theta @ keys_HNE if self.mix else keys_HNE @ self.theta.transpose(1, 2)
        return self.key_norm(keys_HNE)

    def queries(self, projected_BTX: Tensor) -> Tensor:
        """queries_BTHE = LN(W x), from W x for all heads side by side."""
        return self.query_norm(projected_BTX.unflatten(-1, (self.heads, self.codes_HNE.shape[2])))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """scores_BTHN in float32 at least, as the formula says; a retrieval does not build them by this."""
        queries_BTHE = self.queries(self.query(x_BTD))
        with torch.autocast(x_BTD.device.type, enabled=False):
            keys_HNE = self.keys()
            dtype = torch.promote_types(keys_HNE.dtype, torch.float32)
            return torch.einsum("bthe,hne->bthn", queries_BTHE.to(dtype), keys_HNE.to(dtype)) * self.tau


class ProductKeys(nn.Module):
    """The retrieval: tokens -> slots and weights."""

    def __init__(self, config: MemoryConfig, width: int) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.retrieval = config.retrieval
        self.row = KeyAxis(config, width)
        self.col = KeyAxis(config, width)

    def queries(self, x_BTD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """queries_BTHE of the row and of the column axis, in `dtype`.

        Both projections are one product: x is read and cast once, and its gradient comes out of one product too.
        """
        weights_XD = torch.cat([self.row.query.weight, self.col.query.weight])
        both_BTX = functional.linear(x_BTD, weights_XD)
        fused = self.fused_norm(both_BTX)
        if fused is None:
            row_BTX, col_BTX = both_BTX.chunk(2, dim=-1)
            return self.row.queries(row_BTX).to(dtype), self.col.queries(col_BTX).to(dtype)
        norms = self.row.query_norm, self.col.query_norm
        gamma_AE, beta_AE = (torch.stack([getattr(norm, name) for norm in norms]) for name in ("weight", "bias"))
        row_MHE, col_MHE = fused(both_BTX.flatten(0, 1), gamma_AE, beta_AE, norms[0].eps, dtype)
        return row_MHE.unflatten(0, x_BTD.shape[:2]), col_MHE.unflatten(0, x_BTD.shape[:2])

    def fused_norm(self, both_BTX: Tensor) -> Callable[..., tuple[Tensor, Tensor]] | None:
        """`kernels.query_norm.query_norm` on a GPU that the kernels run on, else None: LayerNorm by torch."""
        norm = self.row.query_norm
        # compiled, the plain formula becomes one kernel by itself; the kernels have no float64
        plain = torch.compiler.is_compiling() or not both_BTX.is_cuda or both_BTX.dtype == torch.float64
        if plain or isinstance(norm, nn.Identity) or norm.weight.dtype != torch.float32:
            return None
        if interpreted() or why_no_triton(both_BTX.device):
            return None
        from msn_dist.kernels.query_norm import query_norm

        return query_norm if norm.weight.numel() <= sizes.NORM_WIDTH else None

    def back_end(self, device: torch.device) -> str:
        """What `choose_retrieval` makes of the configuration."""
        return choose_retrieval(self.retrieval, device.type, self.top_k, *self.row.codes_HNE.shape[1:])

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
            keys = self.row.keys().to(dtype), self.col.keys().to(dtype)
            slots_MHK, weights_MHK = self.search(back_end)(*queries, *keys, self.top_k, self.row.tau)
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
    reason = why_no_triton(device) or _too_large(top_k, sub_keys, key_dim)
    if reason is None:
        return "triton"
    if kind == "auto":
        return "reference"
    raise InputError(f"memory.retrieval=triton: {reason}; set memory.retrieval to auto or reference")


def _too_large(top_k: int, sub_keys: int, key_dim: int) -> str | None:
    for name, value, limit in (
        ("top_k", top_k, sizes.MAX_K),
        ("sub_keys", sub_keys, sizes.MAX_SUB_KEYS),
        ("key_dim", key_dim, sizes.MAX_KEY_DIM),
    ):
        if value > limit:
            return f"the kernels take {name} up to {limit}, and it is {value}"
    return None
