"""What a step does on a GPU and not on a CPU, for tensors without data that say they are on a CPU.

Shape suffixes: B samples, T tokens, D width; A = 2 axes, M queries, H heads, N sub-keys of an axis, E key width of one
half, K hits of a head, C survivors of a query (A = 2 * H pairs of axis and head there), G = 2 * M * H bags, S splits of
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


def fused_search(
    note: Callable,
    mix: bool,
    k: int,
    projected_MX: Tensor,
    codes_AHNE: Tensor,
    theta: Tensor | None,
    query_norm: tuple[Tensor, Tensor],
    key_norm: tuple[Tensor, Tensor],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`kernels.search.Search` without its results: the same tensors and scratch live as long as there.

    `note(name, flops, inputs, outputs)` is told of both directions.
    """
    return _Search.apply(projected_MX, codes_AHNE, theta, *query_norm, *key_norm, mix, k, dtype, note)


class _Search(Function):
    @staticmethod
    def forward(
        ctx, projected_MX, codes_AHNE, theta, query_gamma, query_beta, key_gamma, key_beta, mix, k, dtype, note
    ):
        heads, width = codes_AHNE.shape[1], codes_AHNE.shape[3]
        shape_AMHE = 2, len(projected_MX), heads, width
        queries_AMHE = _normalised(projected_MX, query_gamma, query_beta, shape_AMHE, dtype, note)
        mixed_AHNE = codes_AHNE
        if theta is not None:
            mixed_AHNE = theta @ codes_AHNE if mix else codes_AHNE @ theta.mT
        keys_AHNE = _normalised(mixed_AHNE, key_gamma, key_beta, codes_AHNE.shape, dtype, note)
        slots_MHK, weights_MHK = _retrieved(queries_AMHE, keys_AHNE, k, note)
        ctx.note, ctx.mix = note, mix
        given = projected_MX, codes_AHNE, theta, query_gamma, key_gamma
        ctx.save_for_backward(*given, queries_AMHE, mixed_AHNE, keys_AHNE, slots_MHK, weights_MHK)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(slots_MHK)
        return slots_MHK, weights_MHK

    @staticmethod
    @once_differentiable
    def backward(ctx, _, g_MHK):
        given, made = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        projected_MX, codes_AHNE, theta, query_gamma, key_gamma = given
        queries_AMHE, mixed_AHNE, keys_AHNE, *found = made
        g_AMHE, g_AHNE = _retrieved_gradients(queries_AMHE, keys_AHNE, *found, g_MHK, ctx.note)
        of_queries = _normalised_gradients(projected_MX, query_gamma, g_AMHE, ctx.note)
        g_AHNE, *of_key_norm = _normalised_gradients(mixed_AHNE, key_gamma, g_AHNE, ctx.note)
        of_theta = None
        if theta is not None:
            of_theta = g_AHNE @ codes_AHNE.mT if ctx.mix else g_AHNE.mT @ codes_AHNE
            g_AHNE = theta.mT @ g_AHNE if ctx.mix else g_AHNE @ theta
        of_projection, *of_query_norm = of_queries
        return of_projection, g_AHNE, of_theta, *of_query_norm, *of_key_norm, None, None, None, None


def fused_retrieve(
    note: Callable, queries_AMHE: Tensor, keys_AHNE: Tensor, k: int, tau: float
) -> tuple[Tensor, Tensor]:
    """`kernels.ops.retrieve` in the same way."""
    return _Retrieve.apply(queries_AMHE, keys_AHNE, k, note)


class _Retrieve(Function):
    @staticmethod
    def forward(ctx, queries_AMHE, keys_AHNE, k, note):
        slots_MHK, weights_MHK = _retrieved(queries_AMHE.contiguous(), keys_AHNE, k, note)
        ctx.note = note
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(queries_AMHE, keys_AHNE, slots_MHK, weights_MHK)
        ctx.mark_non_differentiable(slots_MHK)
        return slots_MHK, weights_MHK

    @staticmethod
    @once_differentiable
    def backward(ctx, _, g_MHK):
        queries_AMHE, keys_AHNE, *found = ctx.saved_tensors
        of_queries_AMHE, of_keys_AHNE = _retrieved_gradients(
            queries_AMHE.contiguous(), keys_AHNE, *found, g_MHK, ctx.note
        )
        return of_queries_AMHE, of_keys_AHNE.to(keys_AHNE.dtype), None, None


def _retrieved(queries_AMHE: Tensor, keys_AHNE: Tensor, k: int, note: Callable) -> tuple[Tensor, Tensor]:
    """`kernels.retrieval.retrieve`."""
    _, queries, heads, _ = queries_AMHE.shape
    slots_MHK = queries_AMHE.new_empty(queries, heads, k, dtype=torch.int64)
    weights_MHK = queries_AMHE.new_empty(queries, heads, k, dtype=torch.float32)
    padded = -(-min(queries, max(1, sizes.RETRIEVED_AT_ONCE // heads)) // 64) * 64
    survivors_CAM = slots_MHK.new_empty(sizes.survivors_of(k) + 8, 2 * heads, padded)
    counts_AM = slots_MHK.new_empty(2 * heads, padded, dtype=torch.int32)
    best_KAM = weights_MHK.new_empty(2, k, 2 * heads, padded)  # scores, and columns of int32
    del survivors_CAM, counts_AM, best_KAM
    flops = 2 * queries_AMHE.numel() * keys_AHNE.shape[2]
    note("retrieve", flops, (queries_AMHE, keys_AHNE), (slots_MHK, weights_MHK))
    return slots_MHK, weights_MHK


def _retrieved_gradients(
    queries_AMHE: Tensor, keys_AHNE: Tensor, slots_MHK: Tensor, weights_MHK: Tensor, g_MHK: Tensor, note: Callable
) -> tuple[Tensor, Tensor]:
    """`kernels.retrieval.retrieve_backward`."""
    by = _compared if sizes.compares(*keys_AHNE.shape[2:], keys_AHNE.dtype) else _sorted
    gradients = by(queries_AMHE, keys_AHNE, slots_MHK)
    inputs = queries_AMHE, keys_AHNE, slots_MHK, weights_MHK, g_MHK
    note("retrieve_backward", 8 * slots_MHK.numel() * keys_AHNE.shape[3], inputs, gradients)
    return gradients


def _compared(queries_AMHE: Tensor, keys_AHNE: Tensor, slots_MHK: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.key_gradient.gradients`."""
    queries, heads, k = slots_MHK.shape
    of_queries_AMHE = torch.empty_like(queries_AMHE)
    index_AKM = slots_MHK.new_empty(2 * heads, k, queries, dtype=torch.int16)
    dz_HKM = slots_MHK.new_empty(heads, k, queries, dtype=torch.float32)
    _, splits = sizes.compared_splits(queries, heads, sizes.compared_queries(keys_AHNE.dtype))
    sums_SAHNE = dz_HKM.new_empty(splits, *keys_AHNE.shape)
    of_keys_AHNE = dz_HKM.new_empty(keys_AHNE.shape)
    del index_AKM, dz_HKM, sums_SAHNE
    return of_queries_AMHE, of_keys_AHNE


def _sorted(queries_AMHE: Tensor, keys_AHNE: Tensor, slots_MHK: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.retrieval.sorted_gradients`."""
    queries, heads, k = slots_MHK.shape
    bags, (sub_keys, width) = queries * heads, keys_AHNE.shape[2:]
    keys = sub_keys * heads
    keys_GK = slots_MHK.new_empty(2 * bags, k, dtype=torch.int32)
    dz_GK = slots_MHK.new_empty(2 * bags, k, dtype=torch.float32)
    of_queries_AMHE = torch.empty_like(queries_AMHE)
    of_keys_AHNE = dz_GK.new_empty(keys_AHNE.shape)
    scratch = slots_MHK.new_empty(sizes.sorted_bytes(2 * bags * k, 2 * keys, width), dtype=torch.uint8)
    del scratch, keys_GK, dz_GK
    return of_queries_AMHE, of_keys_AHNE


def _normalised(
    x: Tensor, gamma_AE: Tensor, beta_AE: Tensor, shape: tuple[int, ...], dtype: torch.dtype, note: Callable
) -> Tensor:
    """`kernels.axis_norm.normalised_queries` and `normalised_keys`."""
    y = x.new_empty(shape, dtype=dtype)
    note("axis_norm", 0, (x, gamma_AE, beta_AE), (y,))
    return y


def _normalised_gradients(x: Tensor, gamma_AE: Tensor, g: Tensor, note: Callable) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.axis_norm.queries_gradients` and `keys_gradients`."""
    dx = torch.empty_like(x)
    sums_PSAE = gamma_AE.new_empty(sizes.norm_programs(g.shape[1:]), 2, *gamma_AE.shape)
    note("axis_norm_backward", 0, (x, gamma_AE, g), (dx, sums_PSAE))
    dgamma_AE, dbeta_AE = sums_PSAE.sum(0)
    return dx, dgamma_AE, dbeta_AE


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
