"""What a step does on a GPU and not on a CPU, for tensors without data that say they are on a CPU.

Shape suffixes: B samples, T tokens, D width; M queries, H heads, N sub-keys of an axis, E key width of one half, K hits
of a head, A = 2 * H pairs of axis and head (2 axes in the LayerNorm of queries), C survivors of a query, S splits of
the queries (2 sums in the LayerNorm), P programs; X = 2 * H * E.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from msn_dist.kernels import sizes

# of the functions that models here call, those that autocast runs in float32 on CUDA and not on a CPU
_IN_FLOAT32 = frozenset({"layer_norm", "softmax", "sum", "exp", "log1p", "norm", "pow"})


class GpuRules(TorchFunctionMode):
    """autocast's choice of float32 as on CUDA, and dropout's mask of bytes."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_widened, (args, kwargs))
        elif name == "dropout" and len(args) + len(kwargs) > 1:
            share = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
            training = kwargs.get("training", args[2] if len(args) > 2 else True)
            if share and training:
                return torch.native_dropout(args[0], share, True)[0]
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) else value


def fused_retrieve(
    note: Callable,
    row_queries_MHE: Tensor,
    col_queries_MHE: Tensor,
    row_keys_HNE: Tensor,
    col_keys_HNE: Tensor,
    k: int,
    tau: float,
) -> tuple[Tensor, Tensor]:
    """`kernels.ops.retrieve` without its results: the same tensors and scratch live as long as there.

    `note(name, flops, inputs, outputs)` is told of both directions.
    """
    return _Retrieve.apply(row_queries_MHE, col_queries_MHE, row_keys_HNE, col_keys_HNE, k, note)


class _Retrieve(Function):
    @staticmethod
    def forward(ctx, row_queries_MHE, col_queries_MHE, row_keys_HNE, col_keys_HNE, k, note):
        queries, heads, _ = row_queries_MHE.shape
        weights_MHK = row_queries_MHE.new_empty(queries, heads, k, dtype=torch.float32)
        slots_MHK = torch.empty_like(weights_MHK, dtype=torch.int64)
        padded = -(-min(queries, max(1, sizes.RETRIEVED_AT_ONCE // heads)) // 64) * 64
        survivors_CAM = slots_MHK.new_empty(sizes.survivors_of(k) + 8, 2 * heads, padded)
        counts_AM = slots_MHK.new_empty(2 * heads, padded, dtype=torch.int32)
        best_KAM = weights_MHK.new_empty(2, k, 2 * heads, padded)  # scores, and columns of int32
        del survivors_CAM, counts_AM, best_KAM
        operands = row_queries_MHE, col_queries_MHE, row_keys_HNE, col_keys_HNE
        note("retrieve", 4 * row_queries_MHE.numel() * row_keys_HNE.shape[1], operands, (slots_MHK, weights_MHK))
        ctx.note = note
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, slots_MHK, weights_MHK)
        ctx.mark_non_differentiable(slots_MHK)
        return slots_MHK, weights_MHK

    @staticmethod
    @once_differentiable
    def backward(ctx, _, gradient_MHK):
        *operands, slots_MHK, weights_MHK = ctx.saved_tensors
        sub_keys, width = operands[2].shape[1:]
        scratch = _compared if sizes.compares(sub_keys, width, operands[2].dtype) else _sorted
        gradients = scratch(*operands, slots_MHK)
        inputs = *operands, slots_MHK, weights_MHK, gradient_MHK
        flops = 8 * slots_MHK.numel() * operands[0].shape[2]
        ctx.note("retrieve_backward", flops, inputs, gradients)
        return *gradients, None, None


def _compared(
    row_queries_MHE: Tensor, col_queries_MHE: Tensor, row_keys_HNE: Tensor, col_keys_HNE: Tensor, slots_MHK: Tensor
) -> tuple[Tensor, ...]:
    """`kernels.key_gradient.gradients`."""
    queries, heads, k = slots_MHK.shape
    of_queries = [torch.empty_like(operand) for operand in (row_queries_MHE, col_queries_MHE)]
    index_AKM = slots_MHK.new_empty(2 * heads, k, queries, dtype=torch.int16)
    dz_HKM = slots_MHK.new_empty(heads, k, queries, dtype=torch.float32)
    _, splits = sizes.compared_splits(queries, heads, sizes.compared_queries(row_keys_HNE.dtype))
    sums_SANE = dz_HKM.new_empty(splits, 2 * heads, *row_keys_HNE.shape[1:])
    sums_ANE = dz_HKM.new_empty(sums_SANE.shape[1:])
    of_keys = [torch.empty_like(keys) for keys in (row_keys_HNE, col_keys_HNE)]
    del index_AKM, dz_HKM, sums_SANE, sums_ANE
    return *of_queries, *of_keys


def _sorted(
    row_queries_MHE: Tensor, col_queries_MHE: Tensor, row_keys_HNE: Tensor, col_keys_HNE: Tensor, slots_MHK: Tensor
) -> tuple[Tensor, ...]:
    """`kernels.retrieval.sorted_gradients`."""
    queries, heads, k = slots_MHK.shape
    bags, keys, width = queries * heads, row_keys_HNE.shape[1] * heads, row_keys_HNE.shape[2]
    keys_GK = slots_MHK.new_empty(2 * bags, k, dtype=torch.int32)
    dz_GK = slots_MHK.new_empty(2 * bags, k, dtype=torch.float32)
    keys_XE = row_keys_HNE.new_empty(2 * keys, width)
    of_queries = [operand.new_empty(operand.shape) for operand in (row_queries_MHE, col_queries_MHE)]
    queries_GE = row_queries_MHE.new_empty(2 * bags, width)
    sums_XE = slots_MHK.new_empty(2 * keys, width, dtype=torch.float32)
    scratch = slots_MHK.new_empty(sizes.sorted_bytes(2 * bags * k, 2 * keys, width), dtype=torch.uint8)
    del scratch
    of_keys = [part.to(row_keys_HNE.dtype, copy=True).view_as(row_keys_HNE) for part in sums_XE.split(keys)]
    del keys_GK, dz_GK, keys_XE, queries_GE, sums_XE
    return *of_queries, *of_keys


def fused_gate(note: Callable, x_BTD: Tensor, v_BTD: Tensor, kind: str, dtype: torch.dtype | None = None) -> Tensor:
    """`kernels.gate.gate` without its result: the same tensors live as long as there; `note` as above."""
    return _Gate.apply(x_BTD, v_BTD, dtype or x_BTD.dtype, note)


class _Gate(Function):
    @staticmethod
    def forward(ctx, x_BTD, v_BTD, dtype, note):
        out_BTD = torch.empty_like(x_BTD, dtype=dtype)
        note("gate", 0, (x_BTD, v_BTD), (out_BTD,))
        ctx.note = note
        ctx.save_for_backward(x_BTD, v_BTD)
        return out_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx, g_BTD):
        x_BTD, v_BTD = ctx.saved_tensors
        dx_BTD, dv_BTD = torch.empty_like(x_BTD), torch.empty_like(v_BTD)
        ctx.note("gate_backward", 0, (g_BTD, x_BTD, v_BTD), (dx_BTD, dv_BTD))
        return dx_BTD, dv_BTD, None, None


def fused_query_norm(
    note: Callable, projected_MX: Tensor, gamma_AE: Tensor, beta_AE: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`kernels.query_norm.query_norm` without its results: the same tensors live as long as there; `note` as above."""
    return _QueryNorm.apply(projected_MX, gamma_AE, beta_AE, dtype, note)


class _QueryNorm(Function):
    @staticmethod
    def forward(ctx, projected_MX, gamma_AE, beta_AE, dtype, note):
        width = gamma_AE.shape[1]
        shape_MHE = len(projected_MX), projected_MX.shape[1] // (2 * width), width
        row_MHE, col_MHE = (projected_MX.new_empty(shape_MHE, dtype=dtype) for _ in range(2))
        note("query_norm", 0, (projected_MX, gamma_AE, beta_AE), (row_MHE, col_MHE))
        ctx.note = note
        ctx.save_for_backward(projected_MX, gamma_AE)
        return row_MHE, col_MHE

    @staticmethod
    @once_differentiable
    def backward(ctx, g_row_MHE, g_col_MHE):
        projected_MX, gamma_AE = ctx.saved_tensors
        dx_MX = torch.empty_like(projected_MX)
        sums_PSAE = gamma_AE.new_empty(sizes.norm_programs(g_row_MHE.shape), 2, *gamma_AE.shape)
        ctx.note("query_norm_backward", 0, (projected_MX, gamma_AE, g_row_MHE, g_col_MHE), (dx_MX, sums_PSAE))
        dgamma_AE, dbeta_AE = sums_PSAE.sum(0)
        return dx_MX, dgamma_AE, dbeta_AE, None, None
