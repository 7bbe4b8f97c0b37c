"""What a step does on a GPU and not on a CPU, for tensors without data that say they are on a CPU.

Shape suffixes: B samples, T tokens, D width; M queries, H heads, N sub-keys of an axis, E key width of one half, K hits
of a head, A = 2 * H pairs of axis and head, C survivors of a query,
S splits of the queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

# of the functions that models here call, those that autocast runs in float32 on CUDA and not on a CPU
_IN_FLOAT32 = frozenset({"layer_norm", "softmax", "sum", "exp", "log1p", "norm", "pow"})
_SLICE = 131_072  # as kernels.retrieval
_CHUNK, _GROUP = 32, 2048  # as kernels.segments
_MOST_COMPARED, _MOST_SUMS, _PROGRAMS = 256, 2**14, 256  # as kernels.key_gradient


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
        padded = -(-min(queries, max(1, _SLICE // heads)) // 64) * 64
        survivors_CAM = slots_MHK.new_empty(survivors_of(k) + 8, 2 * heads, padded)
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
        gradients = (_compared if compares(operands[2]) else _sorted)(*operands, slots_MHK)
        inputs = *operands, slots_MHK, weights_MHK, gradient_MHK
        flops = 8 * slots_MHK.numel() * operands[0].shape[2]
        ctx.note("retrieve_backward", flops, inputs, gradients)
        return *gradients, None, None


def compares(keys_HNE: Tensor) -> bool:
    """`kernels.key_gradient.fits`."""
    _, sub_keys, width = keys_HNE.shape
    most = _MOST_SUMS if keys_HNE.dtype == torch.bfloat16 else _MOST_SUMS // 2
    sums = math.prod(max(16, 1 << (size - 1).bit_length()) for size in (sub_keys, width))
    return sub_keys <= _MOST_COMPARED and sums <= most


def _compared(
    row_queries_MHE: Tensor, col_queries_MHE: Tensor, row_keys_HNE: Tensor, col_keys_HNE: Tensor, slots_MHK: Tensor
) -> tuple[Tensor, ...]:
    """`kernels.key_gradient.gradients`."""
    queries, heads, k = slots_MHK.shape
    of_queries = [torch.empty_like(operand) for operand in (row_queries_MHE, col_queries_MHE)]
    index_AKM = slots_MHK.new_empty(2 * heads, k, queries, dtype=torch.int16)
    dz_HKM = slots_MHK.new_empty(heads, k, queries, dtype=torch.float32)
    blocks = -(-queries // (64 if row_keys_HNE.dtype == torch.bfloat16 else 16))
    each = -(-blocks // max(1, _PROGRAMS // (2 * heads)))
    splits = -(-blocks // each) if blocks else 0
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
    scratch = slots_MHK.new_empty(sorted_bytes(2 * bags * k, 2 * keys, width), dtype=torch.uint8)
    del scratch
    of_keys = [part.to(row_keys_HNE.dtype, copy=True).view_as(row_keys_HNE) for part in sums_XE.split(keys)]
    del keys_GK, dz_GK, keys_XE, queries_GE, sums_XE
    return *of_queries, *of_keys


def fused_gate(note: Callable, x_BTD: Tensor, v_BTD: Tensor, kind: str) -> Tensor:
    """`kernels.gate.gate` without its result: the same tensors live as long as there; `note` as above."""
    return _Gate.apply(x_BTD, v_BTD, note)


class _Gate(Function):
    @staticmethod
    def forward(ctx, x_BTD, v_BTD, note):
        out_BTD = torch.empty_like(x_BTD)
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
        return dx_BTD, dv_BTD, None


def survivors_of(k: int) -> int:
    """`kernels.survivors.capacity`."""
    return max(16, 2 << max(0, k - 1).bit_length())


def sorted_bytes(hits: int, rows: int, width: int) -> int:
    """Most scratch of `kernels.segments.segments_of`: of the sort, or of sorted hits and their partial sums.

    The sort has keys and places twice, and radix sort takes as much again.
    """
    key = 2 if rows <= 2**15 else 4 if rows <= 2**31 else 8
    sorted_key = 2 if rows <= 2**16 else key
    return hits * (key + 8) + max(2 * hits * (sorted_key + 8), 4 * width * (hits // _CHUNK + hits // _GROUP))
