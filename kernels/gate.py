"""The gate x~ = x * f(v) of a token by what its memory gave it: one pass forward, one backward.

    out = x f(v)        dx = g f(v)        dv = g x f'(v)        f: tanh, 1 + tanh, sigmoid, identity

The backward computes f again from v, so that nothing of its size is kept beside x and v.

Shape suffixes: B samples, T tokens, D width; in the kernels R rows (one token of one sample each) and C columns of a
program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

KINDS = ("tanh", "one_plus_tanh", "sigmoid", "linear")
TYPES = (torch.float32, torch.bfloat16, torch.float16)
_COLUMNS = 1024  # of a program at most
_ELEMENTS = 2048  # of a program: 16 a thread


def gate(x_BTD: Tensor, v_BTD: Tensor, kind: str, dtype: torch.dtype | None = None) -> Tensor:
    """`reference.gate` by the kernels; the gradients of x and v come in their dtypes.

    x, v and `dtype` (of the result; None: that of x) are float32, bfloat16 or float16, each its own; x and v of any
    size and with any strides (where they are not contiguous they are copied).  Arithmetic is float32, and rounded once.
    `kind` is one of KINDS.  Not for torch.compile, which fuses the plain formula itself; outside of it a Function costs
    the host less than an operator.

    Raises ValueError for other kinds, shapes, dtypes and devices.
    """
    if kind not in KINDS:
        raise ValueError(f"gate {kind!r} is not one of {', '.join(KINDS)}")
    if x_BTD.dim() != 3 or v_BTD.shape != x_BTD.shape or v_BTD.device != x_BTD.device:
        raise ValueError(
            f"v is {list(v_BTD.shape)} on {v_BTD.device} and x {list(x_BTD.shape)} on {x_BTD.device}: "
            "give both as [B, T, D] on one device"
        )
    dtype = dtype or x_BTD.dtype
    for name, kind_of in (("x", x_BTD.dtype), ("v", v_BTD.dtype), ("dtype", dtype)):
        if kind_of not in TYPES:
            raise ValueError(f"{name} is {kind_of}: give one of {', '.join(map(str, TYPES))}")
    return _Gate.apply(x_BTD, v_BTD, kind, dtype)


class _Gate(Function):
    @staticmethod
    def forward(ctx, x_BTD, v_BTD, kind, dtype):
        x_BTD, v_BTD = x_BTD.contiguous(), v_BTD.contiguous()
        ctx.kind = kind
        ctx.save_for_backward(x_BTD, v_BTD)
        out_BTD = torch.empty_like(x_BTD, dtype=dtype)
        _launch(gate_kernel, x_BTD.shape, x_BTD, v_BTD, out_BTD, kind=kind)
        return out_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx, g_BTD):
        x_BTD, v_BTD = ctx.saved_tensors
        if g_BTD.stride(2) != 1:
            g_BTD = g_BTD.contiguous()
        dx_BTD, dv_BTD = torch.empty_like(x_BTD), torch.empty_like(v_BTD)
        sizes = x_BTD.shape[1], *g_BTD.stride()[:2]
        _launch(gate_backward_kernel, x_BTD.shape, g_BTD, x_BTD, v_BTD, dx_BTD, dv_BTD, *sizes, kind=ctx.kind)
        return dx_BTD, dv_BTD, None, None


def _launch(kernel: triton.JITFunction, shape: torch.Size, *arguments: Tensor | int, kind: str) -> None:
    batch, tokens, width = shape
    rows = batch * tokens
    if rows == 0 or width == 0:
        return
    columns = min(triton.next_power_of_2(width), _COLUMNS)
    rows_of_program = _ELEMENTS // columns
    grid = triton.cdiv(rows, rows_of_program), triton.cdiv(width, columns)
    kernel[grid](*arguments, rows, D=width, R=rows_of_program, C=columns, KIND=kind)


@triton.jit
def tanh(x):
    # The quotient loses the digits of a small x to 1 - e, so a series (to x^9) stands in for it there.
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    near = 1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835))))
    return tl.where(tl.abs(x) < 0.25, x * near, tl.where(x < 0, -far, far))


@triton.jit
def factor_and_slope(v, KIND: tl.constexpr):
    """f(v) and f'(v)."""
    if KIND == "linear":
        factor = v
        slope = tl.zeros_like(v) + 1.0
    elif KIND == "sigmoid":
        factor = 1.0 / (1.0 + tl.exp(-v))
        slope = factor * (1.0 - factor)
    else:
        factor = tanh(v)
        slope = 1.0 - factor * factor
        if KIND == "one_plus_tanh":
            factor += 1.0
    return factor, slope


@triton.jit(do_not_specialize=["rows"])
def gate_kernel(
    x_ptr,
    v_ptr,
    out_ptr,
    rows,
    D: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    KIND: tl.constexpr,
):
    row_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    col_C = tl.program_id(1) * C + tl.arange(0, C)
    at_RC = row_R[:, None] * D + col_C[None, :]
    real_RC = (row_R < rows)[:, None] & (col_C < D)[None, :]
    x_RC = tl.load(x_ptr + at_RC, mask=real_RC, other=0.0).to(tl.float32)
    v_RC = tl.load(v_ptr + at_RC, mask=real_RC, other=0.0).to(tl.float32)
    factor_RC, _ = factor_and_slope(v_RC, KIND)
    tl.store(out_ptr + at_RC, (x_RC * factor_RC).to(out_ptr.dtype.element_ty), mask=real_RC)


@triton.jit(do_not_specialize=["rows"])
def gate_backward_kernel(
    g_ptr,
    x_ptr,
    v_ptr,
    dx_ptr,
    dv_ptr,
    tokens,
    # of g alone: a network with weights for every token hands back the transpose of [T, B, D]
    stride_b,
    stride_t,
    rows,
    D: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    KIND: tl.constexpr,
):
    row_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    col_C = tl.program_id(1) * C + tl.arange(0, C)
    at_RC = row_R[:, None] * D + col_C[None, :]
    g_at_RC = (row_R // tokens * stride_b + row_R % tokens * stride_t)[:, None] + col_C[None, :]
    real_RC = (row_R < rows)[:, None] & (col_C < D)[None, :]
    g_RC = tl.load(g_ptr + g_at_RC, mask=real_RC, other=0.0).to(tl.float32)
    x_RC = tl.load(x_ptr + at_RC, mask=real_RC, other=0.0).to(tl.float32)
    v_RC = tl.load(v_ptr + at_RC, mask=real_RC, other=0.0).to(tl.float32)
    factor_RC, slope_RC = factor_and_slope(v_RC, KIND)
    tl.store(dx_ptr + at_RC, (g_RC * factor_RC).to(dx_ptr.dtype.element_ty), mask=real_RC)
    tl.store(dv_ptr + at_RC, (g_RC * x_RC * slope_RC).to(dv_ptr.dtype.element_ty), mask=real_RC)
