"""LayerNorm of queries and of keys, both axes in one launch: short rows, one pass forward and one backward.

    y = xhat gamma + beta        xhat = (x - mean) r        r = (var + eps)^-1/2        mean and var over E

    dx = r (w - mean(w) - xhat mean(w xhat)), w = g gamma        dgamma = sum g xhat        dbeta = sum g

Queries come as their projection leaves them, both axes of a token side by side; keys come axis by axis.  The backward
computes mean and r again from x, so that nothing of its size is kept beside x.  Each of its programs adds up gamma's
and beta's gradients over blocks of rows that depend on shapes alone, and one sum over programs follows: runs repeat to
the bit.

Shape suffixes: A = 2 axes, M rows of a head (queries, or sub-keys), H heads, E width, X = A * H * E; P programs, S = 2
sums (for gamma, for beta); in the kernels R rows (of any head) of one axis and C >= E columns of a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msn_dist.kernels.sizes import NORM_ELEMENTS, NORM_WIDTH, norm_programs

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def normalised_queries(
    projected_MX: Tensor, gamma_AE: Tensor, beta_AE: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """queries_AMHE in `dtype`: LayerNorm over E of each axis's half of the projection, by its gamma and beta.

    As `torch.nn.functional.layer_norm` (biased variance), in float32, and rounded once.  The projection and `dtype` are
    float32, bfloat16 or float16, each its own; gamma and beta are float32.  Any M and H, E up to sizes.NORM_WIDTH; what
    is not contiguous is copied.

    Raises ValueError for other shapes, dtypes and devices.
    """
    width = _width(gamma_AE, beta_AE, projected_MX, dtype)
    if projected_MX.dim() != 2 or projected_MX.shape[1] % (2 * width):
        raise ValueError(f"queries are {list(projected_MX.shape)}: give [M, 2 * H * {width}]")
    shape_AMHE = 2, len(projected_MX), projected_MX.shape[1] // (2 * width), width
    return _normalised(projected_MX, gamma_AE, beta_AE, eps, dtype, shape_AMHE, heads=shape_AMHE[2])


def normalised_keys(keys_AHNE: Tensor, gamma_AE: Tensor, beta_AE: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The same of keys, shaped as they come."""
    width = _width(gamma_AE, beta_AE, keys_AHNE, dtype)
    if keys_AHNE.dim() != 4 or keys_AHNE.shape[::3] != (2, width):
        raise ValueError(f"keys are {list(keys_AHNE.shape)}: give [2, H, N, {width}]")
    return _normalised(keys_AHNE, gamma_AE, beta_AE, eps, dtype, keys_AHNE.shape, heads=0)


def queries_gradients(
    projected_MX: Tensor, gamma_AE: Tensor, eps: float, g_AMHE: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of projected_MX, in its dtype, and of gamma_AE and beta_AE in float32, from that of the queries."""
    return _gradients(projected_MX, gamma_AE, eps, g_AMHE, heads=g_AMHE.shape[2])


def keys_gradients(keys_AHNE: Tensor, gamma_AE: Tensor, eps: float, g_AHNE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of keys."""
    return _gradients(keys_AHNE, gamma_AE, eps, g_AHNE, heads=0)


def _width(gamma_AE: Tensor, beta_AE: Tensor, x: Tensor, dtype: torch.dtype) -> int:
    if gamma_AE.dim() != 2 or len(gamma_AE) != 2 or beta_AE.shape != gamma_AE.shape:
        raise ValueError(f"gamma is {list(gamma_AE.shape)} and beta {list(beta_AE.shape)}: give both as [2, E]")
    width = gamma_AE.shape[1]
    if not 1 <= width <= NORM_WIDTH:
        raise ValueError(f"the kernels take E from 1 to {NORM_WIDTH}, and it is {width}")
    for name, tensor in (("gamma", gamma_AE), ("beta", beta_AE)):
        if tensor.dtype != torch.float32 or tensor.device != x.device:
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}: give torch.float32 on {x.device}")
    for name, kind in (("x", x.dtype), ("dtype", dtype)):
        if kind not in TYPES:
            raise ValueError(f"{name} is {kind}: give one of {', '.join(map(str, TYPES))}")
    return width


def _normalised(
    x: Tensor,
    gamma_AE: Tensor,
    beta_AE: Tensor,
    eps: float,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    heads: int,
) -> Tensor:
    y = torch.empty(shape, dtype=dtype, device=x.device)
    _launch(axis_norm_kernel, shape, None, x.contiguous(), gamma_AE.contiguous(), beta_AE.contiguous(), y, eps, heads)
    return y


def _gradients(x: Tensor, gamma_AE: Tensor, eps: float, g: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    x, gamma_AE, g = x.contiguous(), gamma_AE.contiguous(), g.contiguous()
    dx = torch.empty_like(x)
    programs = norm_programs(g.shape[1:])
    sums_PSAE = torch.empty(programs, 2, *gamma_AE.shape, dtype=torch.float32, device=x.device)
    _launch(axis_norm_backward_kernel, g.shape, programs, x, gamma_AE, g, dx, sums_PSAE, eps, heads)
    dgamma_AE, dbeta_AE = sums_PSAE.sum(0)
    return dx, dgamma_AE, dbeta_AE


def _launch(
    kernel: triton.JITFunction,
    shape: tuple[int, int, int, int],
    programs: int | None,
    *operands: Tensor | float,
) -> None:
    """By one program a block of rows, or by so many that share the blocks."""
    *operands, eps, heads = operands
    _, one, other, width = shape
    rows, columns = one * other, triton.next_power_of_2(width)
    if rows == 0:
        return
    block = NORM_ELEMENTS // columns
    grid = programs or triton.cdiv(rows, block), 2
    kernel[grid](*operands, rows, eps, H=heads, E=width, R=block, C=columns)


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
def places(axis, start, rows, H: tl.constexpr, E: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Where rows of an axis, from `start` (int64) on, are in x and in y, and which are real; see the kernels for H."""
    row_R = start + tl.arange(0, R)
    col_C = tl.arange(0, C)
    y_row_R = axis.to(tl.int64) * rows + row_R
    if H == 0:
        x_row_R = y_row_R
    else:
        x_row_R = row_R // H * (2 * H) + axis * H + row_R % H
    x_at_RC = x_row_R[:, None] * E + col_C[None, :]
    return x_at_RC, y_row_R[:, None] * E + col_C[None, :], (row_R < rows)[:, None] & (col_C < E)[None, :]


@triton.jit(do_not_specialize=["rows"])
def axis_norm_kernel(
    x_ptr,
    gamma_ptr,
    beta_ptr,
    y_ptr,
    rows,
    eps,
    H: tl.constexpr,  # heads of an axis that lie side by side in x, and then the other axis's; 0: the axes are apart
    E: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    axis = tl.program_id(1)
    x_at_RC, y_at_RC, real_RC = places(axis, tl.program_id(0).to(tl.int64) * R, rows, H, E, R, C)
    col_C = tl.arange(0, C)
    gamma_C = tl.load(gamma_ptr + axis * E + col_C, mask=col_C < E, other=0.0)
    beta_C = tl.load(beta_ptr + axis * E + col_C, mask=col_C < E, other=0.0)
    x_RC = tl.load(x_ptr + x_at_RC, mask=real_RC, other=0.0).to(tl.float32)
    xhat_RC, _ = normalised(x_RC, eps, real_RC, E)
    y_RC = xhat_RC * gamma_C[None, :] + beta_C[None, :]
    tl.store(y_ptr + y_at_RC, y_RC.to(y_ptr.dtype.element_ty), mask=real_RC)


@triton.jit(do_not_specialize=["rows"])
def axis_norm_backward_kernel(
    x_ptr,
    gamma_ptr,
    g_ptr,
    dx_ptr,
    sums_ptr,
    rows,
    eps,
    H: tl.constexpr,  # as above
    E: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    axis = tl.program_id(1)
    col_C = tl.arange(0, C)
    gamma_C = tl.load(gamma_ptr + axis * E + col_C, mask=col_C < E, other=0.0)
    of_gamma_RC = tl.zeros([R, C], tl.float32)
    of_beta_RC = tl.zeros([R, C], tl.float32)
    for start in range(tl.program_id(0).to(tl.int64) * R, rows, tl.num_programs(0) * R):
        x_at_RC, g_at_RC, real_RC = places(axis, start, rows, H, E, R, C)
        x_RC = tl.load(x_ptr + x_at_RC, mask=real_RC, other=0.0).to(tl.float32)
        g_RC = tl.load(g_ptr + g_at_RC, mask=real_RC, other=0.0).to(tl.float32)
        xhat_RC, r_R = normalised(x_RC, eps, real_RC, E)
        w_RC = g_RC * gamma_C[None, :]
        mean_R = mean(w_RC, E)
        slope_R = mean(w_RC * xhat_RC, E)
        dx_RC = (w_RC - mean_R[:, None] - xhat_RC * slope_R[:, None]) * r_R[:, None]
        tl.store(dx_ptr + x_at_RC, dx_RC.to(dx_ptr.dtype.element_ty), mask=real_RC)
        of_gamma_RC += g_RC * xhat_RC
        of_beta_RC += g_RC
    sums_at_C = (tl.program_id(0) * 4 + axis) * E + col_C
    tl.store(sums_ptr + sums_at_C, tl.sum(of_gamma_RC, 0), mask=col_C < E)
    tl.store(sums_ptr + sums_at_C + 2 * E, tl.sum(of_beta_RC, 0), mask=col_C < E)
