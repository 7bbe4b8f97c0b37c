"""Product-key retrieval: queries and sub-keys -> the k best of N * N slots and their softmax weights.

    survivors     score products of both axes, of which only what may be among the k best is written
    axis_topk     the k best of each axis, sorted
    pair_topk     the k best sums of a row and a column, and their softmax
    key_gradient  the backward where sub-keys are few; where they are many, it is here

Exact with respect to the float32 scores, and deterministic; ties are broken as the three files say.  The backward comes
from the k selected entries alone: no [M, N] scores and no gradient of their size exist in either direction.

Shape suffixes: A = 2 axes (row, column), M queries, H heads, N sub-keys of an axis, E key width of one half, K hits;
G = A * M * H bags, X = A * H * N keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msn_dist.kernels import key_gradient
from msn_dist.kernels.axis_topk import axis_topk
from msn_dist.kernels.pair_topk import pair_topk
from msn_dist.kernels.sizes import MAX_K, MAX_KEY_DIM, MAX_SUB_KEYS, RETRIEVED_AT_ONCE
from msn_dist.kernels.sparse_gather import sparse_gather
from msn_dist.kernels.sparse_scatter import scatter_sum
from msn_dist.kernels.survivors import survivors


def retrieve(queries_AMHE: Tensor, keys_AHNE: Tensor, k: int, tau: float) -> tuple[Tensor, Tensor]:
    """slots_MHK (int64, row * N + column, best first) and weights_MHK (float32): `reference.retrieve` without autograd.

    Both are float32, bfloat16 or float16, of one dtype; products are accumulated in float32.  float32 operands go
    through the matrix units as three tf32 products each, which keeps about 22 bits.

    Raises:
        ValueError: for shapes, dtypes, k, N or E that the kernels do not take.
    """
    _check(queries_AMHE, keys_AHNE, k, tau)
    queries, keys = queries_AMHE.contiguous().unbind(), keys_AHNE.contiguous().unbind()
    count, heads, _ = queries[0].shape
    slots_MHK = torch.empty(count, heads, k, dtype=torch.int64, device=queries[0].device)
    weights_MHK = torch.empty(count, heads, k, device=queries[0].device)
    step = max(1, RETRIEVED_AT_ONCE // heads)
    for start in range(0, count, step):
        part = slice(start, start + step)
        some = (queries[0][part], queries[1][part])
        # unnamed, so that no slice's scratch outlives it
        pair_topk(
            axis_topk(survivors(some, keys, k), some, keys, k, tau),
            keys[0].shape[1],
            slots_MHK[part],
            weights_MHK[part],
        )
    return slots_MHK, weights_MHK


def retrieve_backward(
    queries_AMHE: Tensor,
    keys_AHNE: Tensor,
    slots_MHK: Tensor,
    weights_MHK: Tensor,
    gradient_MHK: Tensor,
    tau: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of queries_AMHE, in their dtype, and of keys_AHNE in float32, from the gradient of the weights.

    dz_j = tau * w_j * (dw_j - sum_l w_l dw_l);  dq = sum_j dz_j K[I_j];  dK[I] = sum of dz * q over the hits of I.

    By products where sub-keys are few (`key_gradient`), else by sorting the hits; either repeats to the bit.
    """
    tensors = queries_AMHE, keys_AHNE, slots_MHK, weights_MHK, gradient_MHK
    by = key_gradient.gradients if key_gradient.fits(keys_AHNE) else sorted_gradients
    return by(*(tensor.contiguous() for tensor in tensors), tau)


def sorted_gradients(
    queries_AMHE: Tensor,
    keys_AHNE: Tensor,
    slots_MHK: Tensor,
    weights_MHK: Tensor,
    gradient_MHK: Tensor,
    tau: float,
) -> tuple[Tensor, Tensor]:
    """`key_gradient.gradients` for any N and E: by a gather from the keys, and a sum over the hits sorted by key."""
    count, heads, k = slots_MHK.shape
    sub_keys, width = keys_AHNE.shape[2:]
    bags, keys_of_axis = count * heads, heads * sub_keys
    # Both axes as one: bags of the column axis and their keys come after those of the row axis.
    keys_GK = torch.empty(2 * bags, k, dtype=torch.int32, device=slots_MHK.device)
    dz_GK = torch.empty(2 * bags, k, device=slots_MHK.device)
    if bags:
        _scores_gradient_kernel[(triton.cdiv(bags, 32),)](
            slots_MHK,
            weights_MHK,
            gradient_MHK,
            keys_GK,
            dz_GK,
            bags,
            heads,
            sub_keys,
            tau,
            k=k,
            padded_k=triton.next_power_of_2(k),
            block=32,
        )
    keys_XE = keys_AHNE.view(2 * keys_of_axis, width)
    of_queries_GE = sparse_gather(keys_XE, keys_GK, dz_GK, out_dtype=queries_AMHE.dtype)
    of_keys_XE = scatter_sum(queries_AMHE.view(2 * bags, width), keys_GK, dz_GK, 2 * keys_of_axis)
    return of_queries_GE.view_as(queries_AMHE), of_keys_XE.view_as(keys_AHNE)


@triton.jit(do_not_specialize=["bags"])
def _scores_gradient_kernel(
    slots,
    weights,
    gradients,
    keys,
    out,
    bags,
    heads,
    sub_keys,
    tau,
    k: tl.constexpr,
    padded_k: tl.constexpr,
    block: tl.constexpr,
):
    """Softmax backward, and the hits' keys as rows of [2 * heads * sub_keys, E]; both for each axis."""
    g = tl.program_id(0) * block + tl.arange(0, block)
    j = tl.arange(0, padded_k)
    mask = (g < bags)[:, None] & (j < k)[None, :]
    of_row = g.to(tl.int64)[:, None] * k + j[None, :]
    of_col = of_row + bags.to(tl.int64) * k
    weight = tl.load(weights + of_row, mask=mask, other=0.0)
    gradient = tl.load(gradients + of_row, mask=mask, other=0.0)
    mean = tl.sum(weight * gradient, 1)
    dz = tau * weight * (gradient - mean[:, None])
    tl.store(out + of_row, dz, mask=mask)
    tl.store(out + of_col, dz, mask=mask)

    slot = tl.load(slots + of_row, mask=mask, other=0)
    row = (slot // sub_keys).to(tl.int32)
    col = (slot - row.to(tl.int64) * sub_keys).to(tl.int32)
    first = (g % heads * sub_keys)[:, None]
    tl.store(keys + of_row, first + row, mask=mask)
    tl.store(keys + of_col, (first + heads * sub_keys) + col, mask=mask)


def _check(queries_AMHE: Tensor, keys_AHNE: Tensor, k: int, tau: float) -> None:
    for name, operand in (("queries", queries_AMHE), ("keys", keys_AHNE)):
        if operand.dim() != 4 or len(operand) != 2:
            raise ValueError(f"{name} of shape {tuple(operand.shape)} must have 4 dimensions, the first of them 2 axes")
        if operand.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} of {operand.dtype}: the kernels take float32, bfloat16 and float16")
    if (keys_AHNE.dtype, keys_AHNE.device) != (queries_AMHE.dtype, queries_AMHE.device):
        raise ValueError(
            f"keys are {keys_AHNE.dtype} on {keys_AHNE.device}, but queries {queries_AMHE.dtype} on "
            f"{queries_AMHE.device}: make them alike"
        )
    heads, sub_keys, width = keys_AHNE.shape[1:]
    if queries_AMHE.shape[2:] != (heads, width):
        raise ValueError(
            f"queries end in {tuple(queries_AMHE.shape[2:])}, but the keys have (heads, E) = {(heads, width)}"
        )
    if not 1 <= k <= min(MAX_K, sub_keys):
        raise ValueError(f"k={k} must be at least 1 and at most {MAX_K} and the {sub_keys} sub-keys")
    if sub_keys > MAX_SUB_KEYS:
        raise ValueError(f"{sub_keys} sub-keys are more than the {MAX_SUB_KEYS} that the kernels take")
    if width > MAX_KEY_DIM:
        raise ValueError(f"keys of width {width} are wider than the {MAX_KEY_DIM} that the kernels take")
    if tau <= 0:
        raise ValueError(f"tau={tau} must be positive")
