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
        self.codes_HNE = nn.Parameter(torch.randn(heads, sub_keys, key_dim))
        match config.theta:
            case "none":
                self.register_parameter("theta", None)
            case "key":
                self.theta = nn.Parameter(torch.eye(key_dim).repeat(heads, 1, 1))
            case "mix":
                self.theta = nn.Parameter(torch.eye(sub_keys).repeat(heads, 1, 1))
        self.mix = config.theta == "mix"
        self.query_norm = nn.LayerNorm(key_dim) if config.layer_norm else nn.Identity()
        self.key_norm = nn.LayerNorm(key_dim) if config.layer_norm else nn.Identity()

    def keys(self) -> Tensor:
        """keys_HNE: the same for every row, so computed once per step and constant when serving."""
        keys_HNE = self.codes_HNE
        if self.theta is not None:
            keys_HNE = self.theta @ keys_HNE if self.mix else keys_HNE @ self.theta.transpose(1, 2)
        return self.key_norm(keys_HNE)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """scores_BTHN, float."""
        queries_BTHE = self.query_norm(self.query(x_BTD).unflatten(-1, (self.heads, self.codes_HNE.shape[2])))
        return torch.einsum("bthe,hne->bthn", queries_BTHE, self.keys()) * self.tau


class ProductKeys(nn.Module):
    """The retrieval: tokens -> slots and weights."""

    def __init__(self, config: MemoryConfig, width: int) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.row = KeyAxis(config, width)
        self.col = KeyAxis(config, width)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """slots_BTHK (int64 in [0, N * N)) and weights_BTHK (float32, softmax over K)."""
        shape_BTH = (*x_BTD.shape[:2], self.row.heads)
        scores_MK, slots_MK = reference.product_key_topk(
            self.row(x_BTD).flatten(0, 2).float(), self.col(x_BTD).flatten(0, 2).float(), self.top_k
        )
        weights_MK = F.softmax(scores_MK, dim=-1)
        return slots_MK.view(*shape_BTH, self.top_k), weights_MK.view(*shape_BTH, self.top_k)
