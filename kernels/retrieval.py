"""Product-key retrieval: queries and sub-keys -> the k best of N * N slots and their softmax weights.

    survivors     score products of both axes, of which only what may be among the k best is written
    axis_topk     the k best of each axis, sorted
    pair_topk     the k best sums of a row and a column, and their softmax
    key_gradient  the backward where sub-keys are few; where they are many, it is here

Exact with respect to the float32 scores, and deterministic; ties are broken as the three files say.  The backward comes
from the k selected entries alone: no [M, N] scores and no gradient of their size exist in either direction.

Shape suffixes: M queries, H heads, N sub-keys of an axis, E key width of one half, K hits.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def retrieve(
    row_queries_MHE: Tensor,
    col_queries_MHE: Tensor,
    row_keys_HNE: Tensor,
    col_keys_HNE: Tensor,
    k: int,
    tau: float,
) -> tuple[Tensor, Tensor]:
    """slots_MHK (int64, row * N + column, best first) and weights_MHK (float32): `reference.retrieve` without autograd.

    All four are float32, bfloat16 or float16, of one dtype; products are accumulated in float32.  float32 operands go
    through the matrix units as three tf32 products each, which keeps about 22 bits.

    Raises:
        ValueError: for shapes, dtypes, k, N or E that the kernels do not take.
    """
    queries, keys = _checked(row_queries_MHE, col_queries_MHE, row_keys_HNE, col_keys_HNE, k, tau)
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
    row_queries_MHE: Tensor,
    col_queries_MHE: Tensor,
    row_keys_HNE: Tensor,
    col_keys_HNE: Tensor,
    slots_MHK: Tensor,
    weights_MHK: Tensor,
    gradient_MHK: Tensor,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of both queries and both keys, in their dtypes, from the gradient of the weights.

    dz_j = tau * w_j * (dw_j - sum_l w_l dw_l);  dq = sum_j dz_j K[I_j];  dK[I] = sum of dz * q over the hits of I.

    By products where sub-keys are few (`key_gradient`), else by sorting the hits; either repeats to the bit.
    """
    given = row_queries_MHE, col_queries_MHE, row_keys_HNE, col_keys_HNE
    found = slots_MHK, weights_MHK, gradient_MHK
    given, found = ([tensor.contiguous() for tensor in tensors] for tensors in (given, found))
    if key_gradient.fits(row_keys_HNE):
        return key_gradient.gradients(given[:2], given[2:], *found, tau)
    return sorted_gradients(given[:2], given[2:], *found, tau)


def sorted_gradients(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    slots_MHK: Tensor,
    weights_MHK: Tensor,
    gradient_MHK: Tensor,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`key_gradient.gradients` for any N and E: by a gather from the keys, and a sum over the hits sorted by key."""
    count, heads, k = slots_MHK.shape
    sub_keys, width = keys[0].shape[1:]
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
    keys_XE = torch.cat(keys).view(2 * keys_of_axis, width)
    of_queries = [
        sparse_gather(keys_XE, keys_GK[axis], dz_GK[axis], out_dtype=queries[0].dtype).view(count, heads, width)
        for axis in (slice(bags), slice(bags, None))
    ]
    queries_GE = torch.cat(queries).view(2 * bags, width)
    sums_XE = scatter_sum(queries_GE, keys_GK, dz_GK, 2 * keys_of_axis)
    of_keys = [sums.to(keys[0].dtype, copy=True).view_as(keys[0]) for sums in sums_XE.split(keys_of_axis)]
    return *of_queries, *of_keys


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


def _checked(
    row_queries: Tensor, col_queries: Tensor, row_keys: Tensor, col_keys: Tensor, k: int, tau: float
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    operands = {
        "row_queries": row_queries, "col_queries": col_queries, "row_keys": row_keys, "col_keys": col_keys,
    }  # fmt: skip
    for name, operand in operands.items():
        if operand.dim() != 3:
            raise ValueError(f"{name} of shape {tuple(operand.shape)} must have 3 dimensions")
        if operand.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} of {operand.dtype}: the kernels take float32, bfloat16 and float16")
        if (operand.dtype, operand.device) != (row_queries.dtype, row_queries.device):
            raise ValueError(
                f"{name} is {operand.dtype} on {operand.device}, but row_queries {row_queries.dtype} on "
                f"{row_queries.device}: make them alike"
            )
    heads, sub_keys, width = row_keys.shape
    if row_queries.shape != col_queries.shape or row_keys.shape != col_keys.shape:
        raise ValueError("both axes must have queries of one shape and keys of one shape")
    if row_queries.shape[1:] != (heads, width):
        raise ValueError(
            f"queries end in {tuple(row_queries.shape[1:])}, but the keys have (heads, E) = {(heads, width)}"
        )
    if not 1 <= k <= min(MAX_K, sub_keys):
        raise ValueError(f"k={k} must be at least 1 and at most {MAX_K} and the {sub_keys} sub-keys")
    if sub_keys > MAX_SUB_KEYS:
        raise ValueError(f"{sub_keys} sub-keys are more than the {MAX_SUB_KEYS} that the kernels take")
    if width > MAX_KEY_DIM:
        raise ValueError(f"keys of width {width} are wider than the {MAX_KEY_DIM} that the kernels take")
    if tau <= 0:
        raise ValueError(f"tau={tau} must be positive")
    return (row_queries.contiguous(), col_queries.contiguous()), (row_keys.contiguous(), col_keys.contiguous())
