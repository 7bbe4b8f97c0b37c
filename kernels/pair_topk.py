"""Third step of the retrieval: the k best slots from the k best rows and the k best columns, and their softmax.

With both lists sorted, only the pairs of ranks (i, j) with (i + 1) * (j + 1) <= k can win (reference.pair_candidates).
Those of the best row (0, j) and of the best column (i, 0) are sorted as they come; the rest is a few.  Ties: of equal
sums the pair with the better row comes first, then the one with the better column.

Shape suffixes: M queries, H heads, K hits, R pairs without rank 0.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from msn_dist.kernels.axis_topk import AxisTopK
from msn_dist.kernels.order import LOWEST, best_of, index_of, merged, packed, score_of
from msn_dist.kernels.reference import pair_candidates

_ENTRIES = 1024  # of the rest, sorted by a warp at a time


def pair_topk(best: AxisTopK, sub_keys: int, slots_MHK: Tensor, weights_MHK: Tensor, block: int | None = None) -> None:
    """Write slots_MHK (int64) and weights_MHK (float32)."""
    count, heads, k = slots_MHK.shape
    rest_2R = _rest(k, slots_MHK.device)
    padded_k = triton.next_power_of_2(k)
    padded_rest = max(padded_k, triton.next_power_of_2(rest_2R.shape[1]))
    block = block or max(1, min(32, _ENTRIES // padded_rest))
    _pair_topk_kernel[(triton.cdiv(count, block), heads)](
        best.scores_KAM,
        best.columns_KAM,
        rest_2R,
        slots_MHK,
        weights_MHK,
        count,
        best.scores_KAM.shape[2],
        sub_keys,
        rest=rest_2R.shape[1],
        padded_rest=padded_rest,
        k=k,
        padded_k=padded_k,
        block=block,
        num_warps=1,
    )


@lru_cache
def _rest(k: int, device: torch.device) -> Tensor:
    """Ranks on both axes of the candidates that are neither in the best row nor in the best column, int32 [2, R]."""
    pair_2P = torch.stack(pair_candidates(k))
    return pair_2P[:, (pair_2P > 0).all(0)].to(device, torch.int32).contiguous()


# as in axis_topk: without knowing that it may load 16 bytes, Triton puts neighbouring queries into neighbouring threads
@triton.jit(do_not_specialize=["padded"])
def _pair_topk_kernel(
    scores,
    columns,
    rest_ranks,
    slots,
    weights,
    count,
    padded,
    sub_keys,
    rest: tl.constexpr,
    padded_rest: tl.constexpr,
    k: tl.constexpr,
    padded_k: tl.constexpr,
    block: tl.constexpr,
):
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    m = tl.program_id(0) * block + tl.arange(0, block)
    exists = m < count
    stride = 2 * heads * padded  # from a rank to the next
    row_list = head * padded + m
    col_list = row_list + heads * padded

    j = tl.arange(0, padded_k)
    best_row = _entries(scores, row_list, col_list, stride, j * 0, j, j < k, exists, k)
    i = padded_k - j  # ascending, as no pair (0, 0) is at the end
    best_col = _entries(scores, row_list, col_list, stride, i, i * 0, i < k, exists, k)
    best = merged(tl.maximum(best_row, best_col), padded_k)

    r = tl.arange(0, padded_rest)
    i = tl.load(rest_ranks + r, mask=r < rest, other=0)
    j = tl.load(rest_ranks + rest + r, mask=r < rest, other=0)
    others = best_of(_entries(scores, row_list, col_list, stride, i, j, r < rest, exists, k), padded_k)
    best = merged(tl.maximum(best, merged(others, padded_k, first_ascends=1)), padded_k)

    j = tl.arange(0, padded_k)
    valid = (j < k)[:, None] & exists[None, :]
    winner = tl.where(valid, index_of(best), 0).to(tl.int64)
    row = tl.load(columns + winner // k * stride + row_list[None, :], mask=valid, other=0)
    col = tl.load(columns + winner % k * stride + col_list[None, :], mask=valid, other=0)

    score = tl.where((j < k)[:, None], score_of(best), float("-inf"))
    weight = tl.exp(score - tl.max(score, 0)[None, :])
    weight /= tl.sum(weight, 0)[None, :]
    at = (m.to(tl.int64) * heads + head)[None, :] * k + j[:, None]
    tl.store(slots + at, row.to(tl.int64) * sub_keys + col, mask=valid)
    tl.store(weights + at, weight, mask=valid)


@triton.jit
def _entries(scores, row_list, col_list, stride, i, j, valid, exists, k: tl.constexpr):
    """Entries [ranks, queries] of the pairs (i, j)."""
    mask = valid[:, None] & exists[None, :]
    row_score = tl.load(scores + i.to(tl.int64)[:, None] * stride + row_list[None, :], mask=mask, other=0.0)
    col_score = tl.load(scores + j.to(tl.int64)[:, None] * stride + col_list[None, :], mask=mask, other=0.0)
    return tl.where(valid[:, None], packed(row_score + col_score, (i * k + j)[:, None]), LOWEST)
