"""Product keys: which k of N * N slots a query reads, and with what weights (DESIGN section 1).

Two small sets of N sub-keys stand for n = N * N keys: slot r = I * N + J scores
s_row[I] + s_col[J], so its top-k comes from the top-k of each axis, at a cost of 2 N instead of N^2.

Shape suffixes: B samples, T tokens, D model width, H heads, E key width of one half (d_k),
N sub-keys per axis, K slots read, M = B * T * H queries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msn_dist.config import MemoryConfig
from msn_dist.kernels import reference


class KeyAxis(nn.Module):
    """Scores of every query against the N sub-keys of one axis.

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

    def forward(self, x_BTD: Tensor) -> Tensor:
        """scores_BTHN, float32 at least: bf16 scores would tie."""
        queries_BTHE = self.query_norm(self.query(x_BTD).unflatten(-1, (self.heads, self.codes_HNE.shape[2])))
        keys_HNE = self.keys()
        with torch.autocast(x_BTD.device.type, enabled=False):
            dtype = torch.promote_types(keys_HNE.dtype, torch.float32)
            return torch.einsum("bthe,hne->bthn", queries_BTHE.to(dtype), keys_HNE.to(dtype)) * self.tau


class ProductKeys(nn.Module):
    """The retrieval: tokens -> slots and weights."""

    def __init__(self, config: MemoryConfig, width: int) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.row = KeyAxis(config, width)
        self.col = KeyAxis(config, width)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """slots_BTHK (int64 in [0, N * N)) and weights_BTHK (float32 at least, softmax over K)."""
        row_BTHN, col_BTHN = self.row(x_BTD), self.col(x_BTD)
        scores_MK, slots_MK = reference.product_key_topk(row_BTHN.flatten(0, 2), col_BTHN.flatten(0, 2), self.top_k)
        shape_BTH = row_BTHN.shape[:3]
        return slots_MK.unflatten(0, shape_BTH), F.softmax(scores_MK, dim=-1).unflatten(0, shape_BTH)
