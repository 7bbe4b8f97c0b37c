"""The retrieval's backward where sub-keys are few: gradients of scores are rebuilt in registers, and nothing is sorted.

A program takes block after block of queries, for one axis and head.  It compares the hits of a block with all sub-keys,
which gives the gradients of the scores [N, M], and adds two products: with the queries, to the keys' gradient, which
stays in registers; with the keys, the queries' gradient, which is written.  A hit and a sub-key take a
comparison and an addition: by the count of instructions 1e-13 s on an H200, where sorting a hit takes 1e-10.

Each program's sums are written on their own and added in order, and the blocks of a program depend on the shapes alone,
so that runs repeat to the bit.

Shape suffixes: M queries, H heads, N sub-keys of an axis, E key width of one half, K hits, A = 2 axes, S splits of the
queries; in kernels M queries of one block, N and E padded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from msn_dist.kernels import sizes
from msn_dist.kernels.support import interpreted


@dataclass(frozen=True)
class Shape:
    """How the kernel is launched."""

    queries: int  # of a block
    warps: int
    programs: int = sizes.COMPARING_PROGRAMS


def fits(keys_AHNE: Tensor) -> bool:
    """Whether all sub-keys of a head and their sums fit into a program."""
    return sizes.compares(*keys_AHNE.shape[2:], keys_AHNE.dtype)


def shape_for(dtype: torch.dtype) -> Shape:
    """The launch for operands of that dtype, within the shared memory of any GPU since capability 8.0."""
    return Shape(queries=sizes.compared_queries(dtype), warps=4 if dtype == torch.bfloat16 else 8)


def gradients(
    queries_AMHE: Tensor,
    keys_AHNE: Tensor,
    slots_MHK: Tensor,
    weights_MHK: Tensor,
    gradient_MHK: Tensor,
    tau: float,
    shape: Shape | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of queries_AMHE, in their dtype, and of keys_AHNE in float32.

    slots_MHK: int64, row * N + column.  weights_MHK and their gradient_MHK: float32.  All is contiguous, and the keys
    `fit`: nothing is checked.  `shape` overrides `shape_for`.

    bfloat16 operands meet scores' gradients of 16 bits, in two parts.  float32 and float16 ones go through the matrix
    units as three tf32 products each, as the gradients have more range than float16.
    """
    count, heads, k = slots_MHK.shape
    sub_keys, width = keys_AHNE.shape[2:]
    dtype, device = keys_AHNE.dtype, keys_AHNE.device
    shape = shape or shape_for(dtype)
    of_queries_AMHE = torch.empty_like(queries_AMHE)
    index_AHKM = torch.empty(2, heads, k, count, dtype=torch.int16, device=device)
    dz_HKM = torch.empty(heads, k, count, device=device)
    each, splits = sizes.compared_splits(count, heads, shape.queries, shape.programs)
    sums_SAHNE = torch.empty(splits, 2, heads, sub_keys, width, device=device)
    if count:
        _hits_kernel[(triton.cdiv(count, 64), heads)](
            slots_MHK,
            weights_MHK,
            gradient_MHK,
            index_AHKM,
            dz_HKM,
            count,
            heads,
            sub_keys,
            tau,
            k=k,
            padded_k=triton.next_power_of_2(k),
            block=64,
        )
        _gradients_kernel[(splits, 2 * heads)](
            *queries_AMHE.unbind(),
            *keys_AHNE.unbind(),
            index_AHKM,
            dz_HKM,
            *of_queries_AMHE.unbind(),
            sums_SAHNE,
            count,
            heads,
            sub_keys,
            triton.cdiv(count, shape.queries),
            each,
            k,
            width=width,
            padded_keys=max(16, triton.next_power_of_2(sub_keys)),
            padded_width=max(16, triton.next_power_of_2(width)),
            block_queries=shape.queries,
            two_parts=dtype == torch.bfloat16,
            scalar=interpreted(),
            num_warps=shape.warps,
        )
    return of_queries_AMHE, sums_SAHNE.sum(0)


@triton.jit(do_not_specialize=["count"])
def _hits_kernel(
    slots,
    weights,
    gradients,
    indices,
    out,
    count,
    heads,
    sub_keys,
    tau,
    k: tl.constexpr,
    padded_k: tl.constexpr,
    block: tl.constexpr,
):
    """Softmax backward, and the hits' rows and columns; queries side by side, as the next kernel reads them."""
    head = tl.program_id(1)
    m = (tl.program_id(0) * block + tl.arange(0, block)).to(tl.int64)
    j = tl.arange(0, padded_k)
    mask = (m < count)[:, None] & (j < k)[None, :]
    at = (m * heads + head)[:, None] * k + j[None, :]
    weight = tl.load(weights + at, mask=mask, other=0.0)
    gradient = tl.load(gradients + at, mask=mask, other=0.0)
    slot = tl.load(slots + at, mask=mask, other=0)
    mean = tl.sum(weight * gradient, 1)
    to = m[:, None] + (head * k + j).to(tl.int64)[None, :] * count
    tl.store(out + to, tau * weight * (gradient - mean[:, None]), mask=mask)
    row = slot // sub_keys
    tl.store(indices + to, row.to(tl.int16), mask=mask)
    to_col = m[:, None] + ((heads + head) * k + j).to(tl.int64)[None, :] * count
    tl.store(indices + to_col, (slot - row * sub_keys).to(tl.int16), mask=mask)


@triton.jit(do_not_specialize=["count", "blocks", "each"])
def _gradients_kernel(
    row_queries,
    col_queries,
    row_keys,
    col_keys,
    indices,
    dz,
    of_row_queries,
    of_col_queries,
    sums,
    count,
    heads,
    sub_keys,
    blocks,
    each,
    k,
    width: tl.constexpr,
    padded_keys: tl.constexpr,
    padded_width: tl.constexpr,
    block_queries: tl.constexpr,
    two_parts: tl.constexpr,
    scalar: tl.constexpr,
):
    pair = tl.program_id(1)  # of axis and head
    axis, head = pair // heads, pair % heads
    queries = tl.where(axis == 0, row_queries, col_queries)
    of_queries = tl.where(axis == 0, of_row_queries, of_col_queries)
    n = tl.arange(0, padded_keys)
    e = tl.arange(0, padded_width)
    inside_NE = (n < sub_keys)[:, None] & (e < width)[None, :]
    at_NE = n[:, None] * width + e[None, :]
    keys = tl.where(axis == 0, row_keys, col_keys) + head * sub_keys * width
    key_NE = _finite(tl.load(keys + at_NE, mask=inside_NE, other=0.0))

    sum_NE = tl.zeros([padded_keys, padded_width], tl.float32)
    first = tl.program_id(0) * each
    for block in range(first, tl.minimum(first + each, blocks)):
        m = (block * block_queries + tl.arange(0, block_queries)).to(tl.int64)
        exists = m < count
        scores_NM = _scores_gradient(
            indices + (pair * k).to(tl.int64) * count + m,
            dz + (head * k).to(tl.int64) * count + m,
            exists,
            count,
            k,
            padded_keys,
            block_queries,
        )
        at_ME = (m * heads + head)[:, None] * width + e[None, :]
        mask_ME = exists[:, None] & (e < width)[None, :]
        query_ME = _finite(tl.load(queries + at_ME, mask=mask_ME, other=0.0))
        if two_parts:
            high_NM = scores_NM.to(query_ME.dtype)
            low_NM = (scores_NM - high_NM.to(tl.float32)).to(query_ME.dtype)
            of_query_ME = tl.zeros([block_queries, padded_width], tl.float32)
            sum_NE = _add_product(sum_NE, high_NM, query_ME, scalar)
            of_query_ME = _add_product(of_query_ME, tl.trans(high_NM), key_NE, scalar)
            sum_NE = _add_product(sum_NE, low_NM, query_ME, scalar)
            of_query_ME = _add_product(of_query_ME, tl.trans(low_NM), key_NE, scalar)
        else:
            sum_NE = tl.dot(scores_NM, query_ME.to(tl.float32), sum_NE, input_precision="tf32x3")
            of_query_ME = tl.dot(tl.trans(scores_NM), key_NE.to(tl.float32), input_precision="tf32x3")
        tl.store(of_queries + at_ME, of_query_ME.to(query_ME.dtype), mask=mask_ME)
    to = sums + (tl.program_id(0) * 2 * heads + pair).to(tl.int64) * (sub_keys * width)
    tl.store(to + at_NE, sum_NE, mask=inside_NE)


@triton.jit
def _scores_gradient(index, dz, exists, count, k, padded_keys: tl.constexpr, block_queries: tl.constexpr):
    """scores_NM: the dz of a query's hits, summed by their sub-keys; index and dz point to the first hits."""
    # n = 4 i + w: threads differ in w and m alone, so that a comparison with 4 i is one with a constant
    four_i = (4 * tl.arange(0, padded_keys // 4))[:, None, None]
    w = tl.arange(0, 4)[None, :, None]
    scores_NM = tl.zeros([padded_keys // 4, 4, block_queries], tl.float32)
    index_M = tl.load(index, mask=exists, other=0).to(tl.int32)
    dz_M = tl.load(dz, mask=exists, other=0.0)
    for j in range(1, k + 1):
        index += count
        dz += count
        next_index_M = tl.load(index, mask=exists & (j < k), other=0).to(tl.int32)  # on its way while this one is added
        next_dz_M = tl.load(dz, mask=exists & (j < k), other=0.0)
        scores_NM = tl.where(index_M[None, None, :] - w == four_i, scores_NM + dz_M[None, None, :], scores_NM)
        index_M, dz_M = next_index_M, next_dz_M
    return tl.reshape(scores_NM, [padded_keys, block_queries])


@triton.jit
def _finite(x):
    """x, and 0 for what is not finite: its hits have weights of NaN, and others must not get 0 * NaN."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0)


@triton.jit
def _add_product(total, a, b, scalar: tl.constexpr):
    if scalar:
        a, b = a.to(tl.float32), b.to(tl.float32)  # the interpreter's product of bfloat16 is wrong
    return tl.dot(a, b, total)
