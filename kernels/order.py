"""Scores as integers that sort as the scores do, packed with the index that breaks ties.

A packed entry is an int64: the ordered score in the upper 32 bits and the complement of an index in the lower ones, so
that the larger entry has the higher score or, between equal scores, the lower index.  NaN comes first, as in
torch.topk; +0 comes before -0.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-0x8000000000000000)  # sorts behind every entry
_NAN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def packed(scores, index):
    """Entries (int64) of float32 scores and int32 indices."""
    bits = tl.where(scores == scores, scores.to(tl.int32, bitcast=True), _NAN)
    return (_flipped(bits).to(tl.int64) << 32) | (index.to(tl.int64) ^ 0xFFFFFFFF)


@triton.jit
def score_of(entries):
    return _flipped((entries >> 32).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def index_of(entries):
    return (~entries).to(tl.int32)


@triton.jit
def _flipped(bits):
    # negative floats order the other way round; an involution
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.constexpr_function
def _log2(power_of_two):
    return power_of_two.bit_length() - 1


@triton.jit
def best_of(entries, k: tl.constexpr):
    """The k largest entries of each column, in descending order: [n, q] -> [k, q]; n and k are powers of two.

    Bitonic: runs of k are sorted in alternating directions, then two runs at a time give one, until one is left.  A
    layout that keeps a column in one thread sorts it in registers alone.
    """
    n: tl.constexpr = entries.shape[0]
    q: tl.constexpr = entries.shape[1]
    for i in tl.static_range(_log2(k)):
        entries = merged(entries, 2 << i)
    for i in tl.static_range(_log2(n // k)):
        # the larger ones of opposite places of a descending and an ascending run: the k largest, bitonic again
        runs = tl.reshape(entries, [n // (2 << i) // k, 2, k, q])
        entries = merged(tl.reshape(tl.max(runs, 1), [n // (2 << i), q]), k)
    return entries


@triton.jit
def merged(entries, run: tl.constexpr, first_ascends: tl.constexpr = 0):
    """Sort bitonic runs, in alternating directions: descending, ascending, descending..."""
    for i in tl.static_range(_log2(run)):
        entries = _exchanged(entries, run, run >> (i + 1), first_ascends)
    return entries


@triton.jit
def _exchanged(entries, run: tl.constexpr, half: tl.constexpr, first_ascends: tl.constexpr):
    """Put places that are `half` apart into the order of their run."""
    n: tl.constexpr = entries.shape[0]
    q: tl.constexpr = entries.shape[1]
    pairs = tl.reshape(entries, [n // (2 * half), 2, half, q])
    other = tl.sum(pairs, 1, keep_dims=True) - pairs
    second = tl.arange(0, 2)[None, :, None, None]
    ascends = (tl.arange(0, n // (2 * half)) * (2 * half) // run + first_ascends) % 2
    return tl.reshape(tl.where((other > pairs) == (second == ascends[:, None, None, None]), other, pairs), [n, q])
