"""Sparse mixture of experts, per token.

Shape suffixes: B rows, T tokens, D width, E experts of one token, A experts that a token visits, H hidden width,
G = T*E expert networks in all, V = B*T*A visits, sorted by expert network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional

from msn_dist.errors import InputError
from msn_dist.memory.autocast import autocast_dtype
from msn_dist.models.blocks import OUTPUT_GAIN
from msn_dist.models.linear import PerTokenLinear, trunc_normal

ALIGNMENT = 8  # grouped_mm needs rows of a multiple of 16 bytes, also in bf16


class SMoE(nn.Module):
    """Each token position has E expert FFNs and a router: [B, T, D] -> ([B, T, D], balance).

    A token visits the A experts with the highest router scores, weighted by a softmax over those A.  Visits are
    sorted by expert and go through one grouped matrix product: what is not chosen is not computed, however skewed
    the routing, and no token is dropped.  Experts have no biases.

    `balance` is the Switch Transformer's (arXiv 2101.03961), averaged over token positions: E * sum_e f_e P_e with
    f_e the share of visits and P_e the mean router probability; 1 when even, 0 without rows.

    Raises InputError unless width and hidden are multiples of 8.
    """

    def __init__(self, tokens: int, width: int, hidden: int, experts: int, active: int):
        super().__init__()
        for name, value in (("model.width", width), ("hidden width model.ffn_ratio * model.width", hidden)):
            if value % ALIGNMENT:
                raise InputError(f"{name}={value} is not a multiple of {ALIGNMENT}, as blocks with experts need")
        self.active = active
        self.router = PerTokenLinear(tokens, width, experts)
        self.up_GDH = nn.Parameter(trunc_normal(tokens * experts, width, hidden))
        self.down_GHD = nn.Parameter(trunc_normal(tokens * experts, hidden, width, gain=OUTPUT_GAIN))

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        tokens, _, experts = self.router.weight_TIO.shape
        scores_BTE = self.router(x_BTD).float()
        top_BTA, expert_BTA = scores_BTE.topk(self.active, -1)
        group_BTA = expert_BTA + torch.arange(0, tokens * experts, experts, device=x_BTD.device)[:, None]
        group_V, order_V = group_BTA.flatten().sort()
        groups_G = torch.arange(tokens * experts, device=x_BTD.device)
        ends_G = torch.searchsorted(group_V, groups_G, right=True, out_int32=True)
        visits_G = ends_G.diff(prepend=ends_G.new_zeros(1))

        place_V = inverse(order_V)

        x_VD = permuted(x_BTD.flatten(0, 1), order_V, place_V, copies=self.active)
        hidden_VH = functional.gelu(grouped_linear(x_VD, self.up_GDH, ends_G))
        y_VD = grouped_linear(hidden_VH, self.down_GHD, ends_G)

        y_BTAD = permuted(y_VD, place_V, order_V).unflatten(0, expert_BTA.shape)
        y_BTD = (top_BTA.softmax(-1).unsqueeze(-1) * y_BTAD).sum(-2)
        return y_BTD, balance_loss(scores_BTE.softmax(-1), visits_G.view(tokens, experts), self.active)

    def inactive_parameters(self) -> int:
        """Weights of the experts that a token does not visit, over all token positions."""
        experts = self.router.bias_TO.shape[1]
        return (self.up_GDH.numel() + self.down_GHD.numel()) // experts * (experts - self.active)


@torch.fx.wrap
def grouped_linear(x_VI: Tensor, weight_GIO: Tensor, ends_G: Tensor) -> Tensor:
    """Rows before ends_G[g] and not before ends_G[g - 1] times weight_GIO[g]: [V, I] -> [V, O]."""
    if dtype := autocast_dtype(x_VI.device.type):  # autocast does not know grouped_mm
        x_VI, weight_GIO = x_VI.to(dtype), weight_GIO.to(dtype)
    return functional.grouped_mm(x_VI, weight_GIO, offs=ends_G)


@torch.fx.wrap
def inverse(order_V: Tensor) -> Tensor:
    """Where a permutation puts each number."""
    return torch.empty_like(order_V).scatter_(0, order_V, torch.arange(len(order_V), device=order_V.device))


@torch.fx.wrap
def permuted(x_MD: Tensor, order_V: Tensor, place_V: Tensor, copies: int = 1) -> Tensor:
    """Rows, of which so many copies are taken each, in another order: [M, D] -> [V, D] with V = M * copies.

    `place_V` is the inverse of `order_V`: gradients are read by it, where index_select's would be added number by
    number, on a GPU in an order that differs from run to run.
    """
    return _Permuted.apply(x_MD, order_V, place_V, copies)


class _Permuted(Function):
    @staticmethod
    def forward(ctx, x_MD, order_V, place_V, copies):
        ctx.save_for_backward(place_V)
        ctx.copied = (len(x_MD), copies)
        return x_MD.index_select(0, order_V if copies == 1 else order_V // copies)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_VD):
        (place_V,) = ctx.saved_tensors
        gradient_VD = gradient_VD.index_select(0, place_V)
        _, copies = ctx.copied
        gradient_MD = gradient_VD if copies == 1 else gradient_VD.unflatten(0, ctx.copied).sum(1)
        return gradient_MD, None, None, None


def balance_loss(probability_BTE: Tensor, visits_TE: Tensor, active: int) -> Tensor:
    """E * sum_e f_e P_e, the mean over token positions; 0 without rows."""
    visits_T1 = visits_TE.sum(-1, keepdim=True).clamp(min=1)  # B * active, but never a division by 0
    share_TE = visits_TE / visits_T1
    mean_TE = probability_BTE.sum(0) * active / visits_T1
    return visits_TE.shape[-1] * (share_TE * mean_TE).sum(-1).mean()
