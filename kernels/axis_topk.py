"""Second step of the retrieval: the k best columns of each axis, sorted, from the survivors.

Ties: of equal scores the lower column comes first.

Shape suffixes: M queries, H heads, N sub-keys of an axis, E key width, K hits, C capacity, A = 2 * H pairs of axis and
head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from msn_dist.kernels import sizes
from msn_dist.kernels.order import LOWEST, best_of, index_of, packed, score_of
from msn_dist.kernels.survivors import Survivors

_ENTRIES = 1024  # sorted by a warp at a time


@dataclass(frozen=True)
class AxisTopK:
    """Best first; M is padded as in Survivors, and what belongs to no query is arbitrary."""

    scores_KAM: Tensor  # float32, times tau
    columns_KAM: Tensor  # int32


def axis_topk(
    found: Survivors,
    queries: tuple[Tensor, Tensor],
    keys: tuple[Tensor, Tensor],
    k: int,
    tau: float,
    block: int | None = None,
) -> AxisTopK:
    """Sort the survivors; queries and keys are there for the queries whose survivors did not fit."""
    capacity = sizes.survivors_of(k)
    pairs, padded = found.count_AM.shape
    device = found.count_AM.device
    best = AxisTopK(
        torch.empty(k, pairs, padded, device=device),
        torch.empty(k, pairs, padded, dtype=torch.int32, device=device),
    )
    rows = pairs * padded
    padded_k = triton.next_power_of_2(k)
    block = block or min(32, _ENTRIES // capacity)
    _axis_topk_kernel[(triton.cdiv(rows, block),)](
        found.candidates_CAM,
        found.count_AM,
        best.scores_KAM,
        best.columns_KAM,
        rows,
        k,
        tau,
        capacity=capacity,
        padded_k=padded_k,
        block=block,
        num_warps=1,
    )
    count, heads, width = queries[0].shape
    _overflow_kernel[(min(512, triton.cdiv(rows, 128)),)](
        *queries,
        *keys,
        found.count_AM,
        best.scores_KAM,
        best.columns_KAM,
        count,
        padded,
        keys[0].shape[1],
        heads,
        rows,
        k,
        tau,
        width=width,
        padded_width=triton.next_power_of_2(width),
        capacity=capacity,
        padded_k=padded_k,
        chunk=max(128, padded_k),
        block=128,
        num_warps=4,
    )
    return best


# Rows lie one beside the other, and a thread sorts one row, or its share of a long one, in its registers.  Triton gives
# it two rows, and splits them over two threads, if it knows that it may load 16 bytes at once: hence no specialization.
@triton.jit(do_not_specialize=["rows"])
def _axis_topk_kernel(
    candidates,
    counts,
    scores,
    columns,
    rows,
    k,
    tau,
    capacity: tl.constexpr,
    padded_k: tl.constexpr,
    block: tl.constexpr,
):
    r = tl.program_id(0) * block + tl.arange(0, block)
    p = tl.arange(0, capacity)
    filled = p[:, None] < tl.load(counts + r, mask=r < rows, other=0)[None, :]
    candidate = tl.load(candidates + p.to(tl.int64)[:, None] * rows + r[None, :], mask=filled, other=0)
    entries = packed((candidate >> 32).to(tl.int32).to(tl.float32, bitcast=True), candidate.to(tl.int32))
    entries = tl.where(filled, entries, LOWEST)
    best = best_of(entries, padded_k)

    j = tl.arange(0, padded_k)
    at = j.to(tl.int64)[:, None] * rows + r[None, :]
    mask = (j < k)[:, None] & (r < rows)[None, :]
    tl.store(scores + at, score_of(best) * tau, mask=mask)
    tl.store(columns + at, index_of(best), mask=mask)


@triton.jit
def _overflow_kernel(
    row_queries,
    col_queries,
    row_keys,
    col_keys,
    counts,
    scores,
    columns,
    count,
    padded,
    sub_keys,
    heads,
    rows,
    k,
    tau,
    width: tl.constexpr,
    padded_width: tl.constexpr,
    capacity: tl.constexpr,
    padded_k: tl.constexpr,
    chunk: tl.constexpr,
    block: tl.constexpr,
):
    """All N columns of the rows whose survivors did not fit, row by row; hardly ever is there one."""
    b = tl.arange(0, block)
    for start in range(tl.program_id(0) * block, rows, tl.num_programs(0) * block):
        over = tl.load(counts + start + b, mask=start + b < rows, other=0) > capacity
        if tl.max(over.to(tl.int32)) > 0:
            for row in range(start, min(start + block, rows)):
                if (tl.load(counts + row) > capacity) & (row % padded < count):
                    pair = row // padded
                    head = pair % heads
                    query = tl.where(pair < heads, row_queries, col_queries)
                    query += ((row % padded).to(tl.int64) * heads + head) * width
                    keys = tl.where(pair < heads, row_keys, col_keys) + head.to(tl.int64) * sub_keys * width
                    best = _best_of_all(query, keys, sub_keys, width, padded_width, padded_k, chunk)
                    j = tl.arange(0, padded_k)
                    at = j.to(tl.int64) * rows + row
                    tl.store(scores + at, score_of(best) * tau, mask=j < k)
                    tl.store(columns + at, index_of(best), mask=j < k)


@triton.jit
def _best_of_all(
    query,
    keys,
    sub_keys,
    width: tl.constexpr,
    padded_width: tl.constexpr,
    padded_k: tl.constexpr,
    chunk: tl.constexpr,
):
    """Entries of the best columns, sorted."""
    e = tl.arange(0, padded_width)
    c = tl.arange(0, chunk)
    query_E = tl.load(query + e, mask=e < width, other=0.0).to(tl.float32)
    best = tl.full([padded_k, 1], LOWEST, tl.int64)
    for start in range(0, sub_keys, chunk):
        inside = start + c < sub_keys
        at = (start + c)[:, None] * width + e[None, :]
        key = tl.load(keys + at, mask=inside[:, None] & (e < width)[None, :], other=0.0).to(tl.float32)
        entries = packed(tl.sum(key * query_E[None, :], 1), start + c)
        new = best_of(tl.where(inside, entries, LOWEST)[:, None], padded_k)
        best = best_of(tl.reshape(tl.join(best, new), [2 * padded_k, 1]), padded_k)
    return tl.reshape(best, [padded_k])
