"""LayerNorm of the queries of both axes: short rows, one pass forward and one backward (DESIGN section 1).

    y = xhat gamma + beta        xhat = (x - mean) r        r = (var + eps)^-1/2        mean and var over E

    dx = r (w - mean(w) - xhat mean(w xhat)), w = g gamma        dgamma = sum g xhat        dbeta = sum g

x is the projection as its product leaves it, both axes side by side, and its gradient comes in one piece as well.  The
backward computes mean and r again from x, so that nothing of its size is kept beside x.  Each of its programs adds up
gamma's and beta's gradients over blocks of rows that depend on shapes alone, and one sum over programs follows: runs
repeat to the bit.

Shape suffixes: A = 2 axes, M queries, H heads, E width, X = A * H * E; P programs, S = 2 sums (for gamma, for beta);
in the kernels R rows (a query and head each) of one axis and C >= E columns of a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from msn_dist.kernels.sizes import NORM_ELEMENTS, NORM_WIDTH, norm_programs

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def query_norm(
    projected_MX: Tensor, gamma_AE: Tensor, beta_AE: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """row_MHE and col_MHE in `dtype`: LayerNorm over E of each axis's half of the projection, by its gamma and beta.

    As `torch.nn.functional.layer_norm` (biased variance), in float32, and rounded once.  The projection and `dtype` are
    float32, bfloat16 or float16, each its own; gamma and beta are float32.  Any M and H, E up to sizes.NORM_WIDTH; what
    is not contiguous is copied.  The gradient of the projection comes in its dtype, those of gamma and beta in float32.
    Not for torch.compile, as `kernels.gate.gate`.

    Raises ValueError for other shapes, dtypes and devices.
    """
    if gamma_AE.dim() != 2 or len(gamma_AE) != 2 or beta_AE.shape != gamma_AE.shape:
        raise ValueError(f"gamma is {list(gamma_AE.shape)} and beta {list(beta_AE.shape)}: give both as [2, E]")
    width = gamma_AE.shape[1]
    if not 1 <= width <= NORM_WIDTH:
        raise ValueError(f"the kernels take E from 1 to {NORM_WIDTH}, and it is {width}")
    if projected_MX.dim() != 2 or projected_MX.shape[1] % (2 * width):
        raise ValueError(f"the projection is {list(projected_MX.shape)}: give [M, 2 * H * {width}]")
    for name, tensor in (("gamma", gamma_AE), ("beta", beta_AE)):
        if tensor.dtype != torch.float32 or tensor.device != projected_MX.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}: give torch.float32 on {projected_MX.device}"
            )
    for name, kind in (("the projection", projected_MX.dtype), ("dtype", dtype)):
        if kind not in TYPES:
            raise ValueError(f"{name} is {kind}: give one of {', '.join(map(str, TYPES))}")
    return _QueryNorm.apply(projected_MX, gamma_AE, beta_AE, eps, dtype)


class _QueryNorm(Function):
    @staticmethod
    def forward(ctx, projected_MX, gamma_AE, beta_AE, eps, dtype):
        projected_MX, gamma_AE, beta_AE = (x.contiguous() for x in (projected_MX, gamma_AE, beta_AE))
        queries, width = len(projected_MX), gamma_AE.shape[1]
        shape_MHE = queries, projected_MX.shape[1] // (2 * width), width
        row_MHE = torch.empty(shape_MHE, dtype=dtype, device=projected_MX.device)
        col_MHE = torch.empty_like(row_MHE)
        _launch(query_norm_kernel, shape_MHE, None, projected_MX, gamma_AE, beta_AE, row_MHE, col_MHE, eps=eps)
        ctx.eps = eps
        ctx.save_for_backward(projected_MX, gamma_AE)
        return row_MHE, col_MHE

    @staticmethod
    @once_differentiable
    def backward(ctx, g_row_MHE, g_col_MHE):
        projected_MX, gamma_AE = ctx.saved_tensors
        g_row_MHE, g_col_MHE = g_row_MHE.contiguous(), g_col_MHE.contiguous()
        dx_MX = torch.empty_like(projected_MX)
        programs, width = norm_programs(g_row_MHE.shape), gamma_AE.shape[1]
        sums_PSAE = torch.empty(programs, 2, 2, width, dtype=torch.float32, device=dx_MX.device)
        tensors = projected_MX, gamma_AE, g_row_MHE, g_col_MHE, dx_MX, sums_PSAE
        _launch(query_norm_backward_kernel, g_row_MHE.shape, programs, *tensors, eps=ctx.eps)
        dgamma_AE, dbeta_AE = sums_PSAE.sum(0)
        return dx_MX, dgamma_AE, dbeta_AE, None, None


def _launch(
    kernel: triton.JITFunction, shape_MHE: tuple[int, ...], programs: int | None, *tensors: Tensor, eps: float
) -> None:
    """By one program a block of rows, or by so many that share the blocks."""
    queries, heads, width = shape_MHE
    rows, columns = queries * heads, triton.next_power_of_2(width)
    if rows == 0:
        return
    block = NORM_ELEMENTS // columns
    grid = programs or triton.cdiv(rows, block), 2
    kernel[grid](*tensors, rows, eps, H=heads, E=width, R=block, C=columns)


@triton.jit
def mean(x_RC, E: tl.constexpr):
    sum_R = tl.sum(x_RC, 1)
    return tl.div_rn(sum_R, tl.zeros_like(sum_R) + E)


@triton.jit
def normalised(x_RC, eps, real_RC, E: tl.constexpr):
    """xhat, 0 outside of the tensor, and r."""
    # divided exactly: what a row has in common is gone then, and r would show what is left of it
    centred_RC = tl.where(real_RC, x_RC - mean(x_RC, E)[:, None], 0.0)
    r_R = 1.0 / tl.sqrt(mean(centred_RC * centred_RC, E) + eps)
    return tl.where(real_RC, centred_RC * r_R[:, None], 0.0), r_R


@triton.jit
def places(start, rows, AXIS: tl.constexpr, H: tl.constexpr, E: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Where rows of an axis, from `start` on, are in the projection and in its queries, and which are real."""
    row_R = start + tl.arange(0, R)
    col_C = tl.arange(0, C)
    at_RC = (row_R // H * (2 * H) + AXIS * H + row_R % H)[:, None] * E + col_C[None, :]
    return at_RC, row_R[:, None] * E + col_C[None, :], (row_R < rows)[:, None] & (col_C < E)[None, :]


@triton.jit
def normalise_block(
    x_ptr,
    gamma_ptr,
    beta_ptr,
    y_ptr,
    rows,
    eps,
    AXIS: tl.constexpr,
    H: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    at_RC, y_at_RC, real_RC = places(tl.program_id(0).to(tl.int64) * R, rows, AXIS, H, E, R, C)
    col_C = tl.arange(0, C)
    gamma_C = tl.load(gamma_ptr + AXIS * E + col_C, mask=col_C < E, other=0.0)
    beta_C = tl.load(beta_ptr + AXIS * E + col_C, mask=col_C < E, other=0.0)
    x_RC = tl.load(x_ptr + at_RC, mask=real_RC, other=0.0).to(tl.float32)
    xhat_RC, _ = normalised(x_RC, eps, real_RC, E)
    y_RC = xhat_RC * gamma_C[None, :] + beta_C[None, :]
    tl.store(y_ptr + y_at_RC, y_RC.to(y_ptr.dtype.element_ty), mask=real_RC)


@triton.jit(do_not_specialize=["rows"])
def query_norm_kernel(
    x_ptr,
    gamma_ptr,
    beta_ptr,
    row_ptr,
    col_ptr,
    rows,
    eps,
    H: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    if tl.program_id(1) == 0:
        normalise_block(x_ptr, gamma_ptr, beta_ptr, row_ptr, rows, eps, 0, H, E, R, C)
    else:
        normalise_block(x_ptr, gamma_ptr, beta_ptr, col_ptr, rows, eps, 1, H, E, R, C)


@triton.jit
def gradients_of_blocks(
    x_ptr,
    gamma_ptr,
    g_ptr,
    dx_ptr,
    sums_ptr,
    rows,
    eps,
    AXIS: tl.constexpr,
    H: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    col_C = tl.arange(0, C)
    gamma_C = tl.load(gamma_ptr + AXIS * E + col_C, mask=col_C < E, other=0.0)
    of_gamma_RC = tl.zeros([R, C], tl.float32)
    of_beta_RC = tl.zeros([R, C], tl.float32)
    for start in range(tl.program_id(0).to(tl.int64) * R, rows, tl.num_programs(0) * R):
        at_RC, g_at_RC, real_RC = places(start, rows, AXIS, H, E, R, C)
        x_RC = tl.load(x_ptr + at_RC, mask=real_RC, other=0.0).to(tl.float32)
        g_RC = tl.load(g_ptr + g_at_RC, mask=real_RC, other=0.0).to(tl.float32)
        xhat_RC, r_R = normalised(x_RC, eps, real_RC, E)
        w_RC = g_RC * gamma_C[None, :]
        mean_R = mean(w_RC, E)
        slope_R = mean(w_RC * xhat_RC, E)
        dx_RC = (w_RC - mean_R[:, None] - xhat_RC * slope_R[:, None]) * r_R[:, None]
        tl.store(dx_ptr + at_RC, dx_RC.to(dx_ptr.dtype.element_ty), mask=real_RC)
        of_gamma_RC += g_RC * xhat_RC
        of_beta_RC += g_RC
    sums_at_C = (tl.program_id(0) * 4 + AXIS) * E + col_C
    tl.store(sums_ptr + sums_at_C, tl.sum(of_gamma_RC, 0), mask=col_C < E)
    tl.store(sums_ptr + sums_at_C + 2 * E, tl.sum(of_beta_RC, 0), mask=col_C < E)


@triton.jit(do_not_specialize=["rows"])
def query_norm_backward_kernel(
    x_ptr,
    gamma_ptr,
    g_row_ptr,
    g_col_ptr,
    dx_ptr,
    sums_ptr,
    rows,
    eps,
    H: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    if tl.program_id(1) == 0:
        gradients_of_blocks(x_ptr, gamma_ptr, g_row_ptr, dx_ptr, sums_ptr, rows, eps, 0, H, E, R, C)
    else:
        gradients_of_blocks(x_ptr, gamma_ptr, g_col_ptr, dx_ptr, sums_ptr, rows, eps, 1, H, E, R, C)
