"""Product keys: which k of N * N slots a query reads, and with what weights.

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

    def projected(self, x_BTD: Tensor) -> Tensor:
        """Queries of both axes before their norm, [B, T, X]."""
        return functional.linear(x_BTD, self.query_XD)

    def queries(self, projected_BTX: Tensor) -> Tensor:
        """queries_ABTHE = LN(W x), by torch; not contiguous."""
        queries_BTAHE = projected_BTX.unflatten(-1, (2, self.heads, -1))
        if self.query_norm is not None:
            queries_BTAHE = self.query_norm(queries_BTAHE, between=1)
        return queries_BTAHE.movedim(2, 0)

    def scores(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """scores_BTHN of either axis in float32 at least, by the formula: the truth, which a retrieval never builds."""
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        queries_ABTHE = self.queries(self.projected(x_BTD)).to(dtype)
        with torch.autocast(x_BTD.device.type, enabled=False):
            row_BTHN, col_BTHN = (
                torch.einsum("bthe,hne->bthn", queries_BTHE, keys_HNE.to(dtype)) * self.tau
                for queries_BTHE, keys_HNE in zip(queries_ABTHE, self.keys(), strict=True)
            )
        return row_BTHN, col_BTHN

    def back_end(self, device: torch.device) -> str:
        """What `choose_retrieval` makes of the configuration."""
        return choose_retrieval(self.retrieval, device.type, self.top_k, *self.codes_AHNE.shape[2:])

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """slots_BTHK (int64 in [0, N * N), best first) and weights_BTHK (float32 at least, softmax over K).

        Products are of float32 operands, or of 16 bits under autocast, and are added up in float32: sums of
        16 bits would tie.
        """
        projected_BTX = self.projected(x_BTD)
        back_end = self.back_end(x_BTD.device)
        # the kernels have no float64
        exact = torch.float32 if back_end == "triton" else torch.promote_types(x_BTD.dtype, torch.float32)
        dtype = autocast_dtype(x_BTD.device.type) or exact
        at_once = self.has_search(back_end) and projected_BTX.dtype != torch.float64
        find = self.found_at_once if at_once else self.found_in_steps
        slots_MHK, weights_MHK = find(projected_BTX, dtype)
        shape_BTHK = *x_BTD.shape[:2], self.heads, self.top_k
        return slots_MHK.view(shape_BTHK), weights_MHK.view(shape_BTHK)

    def found_in_steps(self, projected_BTX: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """slots_MHK and weights_MHK by the formulas, and by either back end's retrieval; operands meet in `dtype`."""
        queries_AMHE = self.queries(projected_BTX).to(dtype).flatten(1, 2)
        with _without_autocast(projected_BTX):
            keys_AHNE = self.keys().to(dtype)
            retrieve = self.retriever(self.back_end(projected_BTX.device))
            return retrieve(queries_AMHE, keys_AHNE, self.top_k, self.tau)

    def found_at_once(self, projected_BTX: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The same by the kernels alone, as one function of autograd."""
        norms = ((norm.gamma_AE, norm.beta_AE) for norm in (self.query_norm, self.key_norm))
        with _without_autocast(projected_BTX):
            return self.search()(projected_BTX.flatten(0, 1), self.codes_AHNE, self.theta, *norms, dtype)

    def retriever(self, back_end: str) -> Callable[..., tuple[Tensor, Tensor]]:
        """`kernels.reference.retrieve`, or the same by the kernels."""
        if back_end == "reference":
            return reference.retrieve
        from msn_dist.kernels.ops import retrieve

        return retrieve

    def search(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """`kernels.search.Search` with this memory's numbers."""
        from msn_dist.kernels.search import Search

        return Search(self.top_k, self.tau, AxisNorm.eps, self.mix)

    def has_search(self, back_end: str) -> bool:
        """Whether kernels do all of it."""
        # compiled, the plain formulas become a kernel or two by themselves
        return back_end == "triton" and self.normalises() and not (torch.compiler.is_compiling() or interpreted())

    def normalises(self) -> bool:
        """Whether there are norms, and the kernels take them: they have no float64."""
        width, dtype = self.codes_AHNE.shape[-1], self.codes_AHNE.dtype
        return self.query_norm is not None and dtype == torch.float32 and width <= sizes.NORM_WIDTH


def _without_autocast(x: Tensor) -> torch.autocast:
    """For products with keys: they are few, and casts would cost more than products of 32 bits."""
    return torch.autocast(x.device.type, enabled=False)


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
