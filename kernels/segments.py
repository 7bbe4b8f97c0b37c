"""Sums over all hits of a row, without atomics: hits sorted by row, and the runs of equal rows, the segments, summed.

A program has CHUNK sorted hits and owns the segments that begin among them.  It takes them in tiles of S hits, and
skips tiles in which none begins.  The segments of a tile end in it but for the last, which may go on, beyond the
program's hits too: its further hits are taken T at a time.  So that a row with a million hits costs no million steps,
two kernels run before: every aligned chunk of hits that lies in one segment is summed to one row of partial sums, and
every aligned group of chunks likewise; the walk along the last segment takes those rows in the hits' place.  The order
of every sum is fixed by the sorted hits alone, so that runs repeat to the bit.

Shape suffixes: R rows of the table, D its width, G bags, H hits, C chunks, P rows of partial sums (chunks, then
groups); in kernels L hits of a program, S of one tile, T of one step of a walk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from msn_dist.kernels import sizes
from msn_dist.kernels.sparse_bags import Bags

CHUNK, GROUP = tl.constexpr(sizes.CHUNK), tl.constexpr(sizes.GROUP)
MOST_HITS = 2**31 - 2**20


@dataclass(frozen=True)
class TileShape:
    """How launches over sorted hits are cut: hits of a tile, hits of a step where a segment goes on beyond its tile,
    and warps of a program.  Hits are powers of two up to CHUNK."""

    hits: int
    step: int
    warps: int = 1


@dataclass(frozen=True)
class Segments:
    """Hits of a row next to each other, and partial sums of weight * source over their chunks and groups."""

    keys_H: Tensor
    order_H: Tensor
    bag_H: Tensor | None  # of the unsorted hits, where bags differ in size
    weights_H: Tensor | None
    source_GD: Tensor
    partial_PD: Tensor
    size: int
    shape: TileShape

    @property
    def grid(self) -> tuple[int]:
        return (triton.cdiv(len(self.keys_H), sizes.CHUNK),)

    @property
    def pointers(self) -> tuple[Tensor | None, ...]:
        return self.keys_H, self.order_H, self.bag_H, self.weights_H, self.source_GD

    @property
    def of_hits(self) -> dict[str, int]:
        """Constants of a kernel that takes hits as they come."""
        width = self.source_GD.shape[1]
        padded = triton.next_power_of_2(width)
        return dict(D=width, D_PAD=padded, T=self.shape.step, num_warps=self.shape.warps)

    @property
    def of_tiles(self) -> dict[str, int]:
        """Constants of a kernel that takes tiles."""
        return dict(SIZE=self.size, S=self.shape.hits, **self.of_hits)


def tile_shape(width: int, hits_of_a_row: float) -> TileShape:
    """Few numbers of a tile to a warp, so that many tiles are under way.

    Fewer where rows have many hits, as a tile waits for its longest segment.  Bounds are those of an H200.
    """
    padded = triton.next_power_of_2(width)
    warps = max(padded // 1024, 1)
    if hits_of_a_row < 8:
        hits = min(max(256 // padded, 1), 16)
        return TileShape(hits, hits, warps)
    return TileShape(min(max(128 // padded, 1), 8), min(max(512 // padded, 1), 16), warps)


def segments_of(
    bags: Bags,
    rows: int,
    source_GD: Tensor,
    values_RD: Tensor | None = None,
    dot_H: Tensor | None = None,
    shape: TileShape | None = None,
    once: bool = False,
) -> Segments:
    """Sorts the hits and sums the chunks and groups that lie in one segment.

    rows: R.  With `dot_H` [H], the products <source_GD[bag], values_RD[row]> of the hits in such chunks are written to
    it, in the hits' own order.  `once` says that no row is hit twice: every hit is a segment of its own then, in any
    order, so nothing is sorted or summed.  Nothing here waits for the device.
    """
    hits, width = len(bags.rows_H), source_GD.shape[1]
    if hits > MOST_HITS:
        raise ValueError(f"there are {hits} hits: at most {MOST_HITS} can be sorted at once; split the bags")
    if once:
        keys_H = bags.rows_H.to(sizes.key_dtype(rows))
        order_H = torch.arange(hits, dtype=torch.int32, device=keys_H.device)
    else:
        keys_H, order_H = _sorted(bags.rows_H, rows)
    bag_H = None
    if bags.offsets_G1 is not None:
        each_G = torch.arange(bags.count, dtype=torch.int32, device=keys_H.device)
        bag_H = torch.repeat_interleave(each_G, bags.offsets_G1.diff(), output_size=hits)
    chunks, groups = (0, 0) if once else (hits // sizes.CHUNK, hits // sizes.GROUP)
    partial_PD = torch.empty(chunks + groups, width, dtype=torch.float32, device=keys_H.device)
    shape = shape or tile_shape(width, hits / rows)
    segments = Segments(keys_H, order_H, bag_H, bags.weights_H, source_GD, partial_PD, bags.size, shape)
    if chunks:
        each = 8 if width <= 128 else 1
        sum_chunks_kernel[(triton.cdiv(chunks, each),)](
            *segments.pointers,
            values_RD,
            dot_H,
            partial_PD,
            hits,
            CHUNKS=each,
            SIZE=bags.size,
            **segments.of_hits,
        )
    if groups:
        sum_groups_kernel[(groups,)](keys_H, partial_PD, hits, **segments.of_hits)
    return segments


def _sorted(rows_H: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The rows in ascending order, as integers of 2, 4 or 8 bytes, and where they were: the fewer bytes, the faster."""
    if 2**15 < rows <= 2**16:  # without a sign they fit 16 bits: the first bit flipped, they sort with one
        keys_H, order_H = torch.sort(rows_H.to(torch.int16) ^ -(2**15), stable=True)
        return keys_H.to(torch.int32).add_(2**15), order_H
    return torch.sort(rows_H.to(sizes.key_dtype(rows)), stable=True)


@triton.jit
def find_begins(keys_ptr, hits):
    """Those of this program's hits that begin a segment, and `hits` in the others' place."""
    hit_L = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    key_L = tl.load(keys_ptr + hit_L, mask=hit_L < hits, other=-1)
    previous_L = tl.load(keys_ptr + hit_L - 1, mask=(hit_L > 0) & (hit_L < hits), other=-1)
    return tl.where(key_L != previous_L, hit_L, hits)


@triton.jit
def next_tile(begin_L, at, hits, S: tl.constexpr):
    """Start of the first tile, not before `at`, in which a segment begins; `hits` if there is none."""
    begin = tl.min(tl.where(begin_L >= at, begin_L, hits), 0)
    return tl.where(begin < hits, begin // S * S, hits)


@triton.jit
def load_tile(keys_ptr, order_ptr, start, hits, S: tl.constexpr):
    """Of the tile at `start` its hits, their keys and order; where segments begin, which hits another one of the same
    segment follows, and where the last segment begins."""
    hit_S = start + tl.arange(0, S)
    # All at once: what waits for one read before it asks for the next takes longer than the sums.
    key_S = tl.load(keys_ptr + hit_S, mask=hit_S < hits, other=-1)
    previous_S = tl.load(keys_ptr + hit_S - 1, mask=(hit_S > 0) & (hit_S < hits), other=-1)
    next_S = tl.load(keys_ptr + hit_S + 1, mask=hit_S + 1 < hits, other=-1)
    order_S = tl.load(order_ptr + hit_S, mask=hit_S < hits, other=0)
    own_S = key_S != previous_S
    return hit_S, key_S, order_S, own_S, key_S == next_S, tl.max(tl.where(own_S, hit_S, -1), 0)


@triton.jit
def weighted_sources(
    order_S, bag_ptr, weights_ptr, source_ptr, value_SD, dot_ptr, take_S, col_D, D: tl.constexpr, SIZE: tl.constexpr
):
    """weight * source of hits, zeros where not taken; the products of sources and values go to dot_ptr, if any."""
    order_S = order_S.to(tl.int32)
    if bag_ptr is None:
        bag_S = order_S // SIZE
    else:
        bag_S = tl.load(bag_ptr + order_S, mask=take_S, other=0)
    from_SD = source_ptr + (bag_S.to(tl.int64) * D)[:, None] + col_D[None, :]
    source_SD = tl.load(from_SD, mask=take_S[:, None] & (col_D < D)[None, :], other=0.0).to(tl.float32)
    weight_S = tl.full([order_S.shape[0]], 1.0, tl.float32)
    if weights_ptr is not None:  # before the store below, which a load may not overtake
        weight_S = tl.load(weights_ptr + order_S, mask=take_S, other=0.0).to(tl.float32)
    if dot_ptr is not None:
        tl.store(dot_ptr + order_S, tl.sum(source_SD * value_SD.to(tl.float32), axis=1), mask=take_S)
    return source_SD * weight_S[:, None]


@triton.jit
def load_rows(values_ptr, row_S, take_S, col_D, D: tl.constexpr):
    from_SD = values_ptr + (row_S.to(tl.int64) * D)[:, None] + col_D[None, :]
    return tl.load(from_SD, mask=take_S[:, None] & (col_D < D)[None, :], other=0.0)


@triton.jit
def sum_tail(
    keys_ptr,
    order_ptr,
    bag_ptr,
    weights_ptr,
    source_ptr,
    values_ptr,
    dot_ptr,
    partial_ptr,
    hits,
    begin,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SIZE: tl.constexpr,
    T: tl.constexpr,
):
    """Sum [D] of the segment that begins at hit `begin` and has more than it, without that hit, T hits at a time."""
    lane_T = tl.arange(0, T)
    col_D = tl.arange(0, D_PAD)
    last = tl.load(keys_ptr + begin)
    sum_D = tl.zeros([D_PAD], tl.float32)
    value_1D = sum_D[None, :]
    if dot_ptr is not None:
        value_1D = load_rows(
            values_ptr, tl.zeros([1], tl.int64) + last.to(tl.int64), tl.full([1], 1, tl.int1), col_D, D
        )
    at = begin // T * T
    key = last
    while key == last:
        hit_T = at + lane_T
        mask_T = (hit_T > begin) & (hit_T < hits)
        chunk_end = tl.where((at > begin) & (at % CHUNK == 0), at + CHUNK, hits + 1)
        # All at once, as in load_tile.
        key_T = tl.load(keys_ptr + hit_T, mask=mask_T, other=-1)
        order_T = tl.load(order_ptr + hit_T, mask=mask_T, other=0)
        chunk_key = tl.load(keys_ptr + chunk_end - 1, mask=chunk_end <= hits, other=-1)
        key = tl.load(keys_ptr + at + T, mask=at + T < hits, other=-1)
        if chunk_key == last:
            group_end = tl.where(at % GROUP == 0, at + GROUP, hits + 1)
            whole_group = tl.load(keys_ptr + group_end - 1, mask=group_end <= hits, other=-1) == last
            stride = tl.where(whole_group, GROUP, CHUNK)
            # Chunks are taken up to where a group begins, and groups without an end.
            end = tl.where(whole_group, hits, tl.minimum((at // GROUP + 1) * GROUP, hits))
            partial = tl.where(whole_group, hits // CHUNK, 0) + at // stride
            end_T = at + (lane_T + 1) * stride
            take_T = tl.load(keys_ptr + end_T - 1, mask=end_T <= end, other=-1) == last
            sum_D += tl.sum(load_rows(partial_ptr, partial + lane_T, take_T, col_D, D), axis=0)
            at += stride * tl.sum(take_T.to(tl.int32), 0)
            key = tl.load(keys_ptr + at, mask=at < hits, other=-1)
        else:
            more_TD = weighted_sources(
                order_T, bag_ptr, weights_ptr, source_ptr, value_1D, dot_ptr, key_T == last, col_D, D, SIZE
            )
            sum_D += tl.sum(more_TD, axis=0)
            at += T
    return sum_D


@triton.jit
def sum_segments(
    keys_ptr,
    order_ptr,
    bag_ptr,
    weights_ptr,
    source_ptr,
    values_ptr,
    dot_ptr,
    partial_ptr,
    hits,
    hit_S,
    key_S,
    order_S,
    own_S,
    again_S,
    last_begin,
    value_SD,
    col_D,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SIZE: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
):
    """Sums [S, D] of weight * source over the segments that begin in the tile, at own_S; see load_tile."""
    goes_on = tl.max((again_S & (hit_S == last_begin)).to(tl.int32), 0) > 0
    tail_D = tl.zeros([D_PAD], tl.float32)
    if goes_on:  # before the sums of the tile, so that these hold no registers in there
        tail_D = sum_tail(
            keys_ptr,
            order_ptr,
            bag_ptr,
            weights_ptr,
            source_ptr,
            values_ptr,
            dot_ptr,
            partial_ptr,
            hits,
            last_begin,
            D,
            D_PAD,
            SIZE,
            T,
        )
    sum_SD = weighted_sources(order_S, bag_ptr, weights_ptr, source_ptr, value_SD, dot_ptr, own_S, col_D, D, SIZE)
    # The others end in the tile: their second hits at once, then their third ones, and so on.
    take_S = own_S & (hit_S < last_begin) & again_S
    beyond = 1
    while tl.max(take_S.to(tl.int32), 0) > 0:
        at_S = hit_S + beyond
        next_S = tl.load(order_ptr + at_S, mask=take_S, other=0)
        sum_SD += weighted_sources(next_S, bag_ptr, weights_ptr, source_ptr, value_SD, dot_ptr, take_S, col_D, D, SIZE)
        beyond += 1
        take_S = take_S & (tl.load(keys_ptr + at_S + 1, mask=take_S, other=-1) == key_S)
    if goes_on:
        sum_SD += tl.where((hit_S == last_begin)[:, None], tail_D[None, :], 0.0)
    return sum_SD


@triton.jit(do_not_specialize=["hits"])
def sum_chunks_kernel(
    keys_ptr,
    order_ptr,
    bag_ptr,
    weights_ptr,
    source_ptr,
    values_ptr,
    dot_ptr,
    partial_ptr,
    hits,
    CHUNKS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SIZE: tl.constexpr,
    T: tl.constexpr,
):
    first = tl.program_id(0) * CHUNKS
    start_C = (first + tl.arange(0, CHUNKS)) * CHUNK
    full_C = start_C + CHUNK <= hits
    head_C = tl.load(keys_ptr + start_C, mask=full_C, other=-1)
    foot_C = tl.load(keys_ptr + start_C + CHUNK - 1, mask=full_C, other=-2)
    if tl.max((head_C == foot_C).to(tl.int32), 0) == 0:
        return
    lane_T = tl.arange(0, T)
    col_D = tl.arange(0, D_PAD)
    for c in range(CHUNKS):
        chunk = first + c
        start = chunk * CHUNK
        full = start + CHUNK <= hits
        key = tl.load(keys_ptr + start, mask=full, other=-1)
        if key == tl.load(keys_ptr + start + CHUNK - 1, mask=full, other=-2):
            take_T = lane_T >= 0
            sum_TD = tl.zeros([T, D_PAD], tl.float32)
            value_TD = sum_TD
            if dot_ptr is not None:
                value_TD = load_rows(values_ptr, tl.zeros([T], tl.int64) + key.to(tl.int64), take_T, col_D, D)
            for done in range(0, CHUNK, T):
                order_T = tl.load(order_ptr + start + done + lane_T)
                sum_TD += weighted_sources(
                    order_T, bag_ptr, weights_ptr, source_ptr, value_TD, dot_ptr, take_T, col_D, D, SIZE
                )
            tl.store(partial_ptr + chunk.to(tl.int64) * D + col_D, tl.sum(sum_TD, axis=0), mask=col_D < D)


@triton.jit(do_not_specialize=["hits"])
def sum_groups_kernel(keys_ptr, partial_ptr, hits, D: tl.constexpr, D_PAD: tl.constexpr, T: tl.constexpr):
    group = tl.program_id(0)
    key = tl.load(keys_ptr + group * GROUP)
    if key == tl.load(keys_ptr + group * GROUP + GROUP - 1):
        col_D = tl.arange(0, D_PAD)
        lane_T = tl.arange(0, T)
        sum_TD = tl.zeros([T, D_PAD], tl.float32)
        for done in range(0, GROUP // CHUNK, T):
            sum_TD += load_rows(partial_ptr, group * (GROUP // CHUNK) + done + lane_T, lane_T >= 0, col_D, D)
        to_D = partial_ptr + (hits // CHUNK + group).to(tl.int64) * D + col_D
        tl.store(to_D, tl.sum(sum_TD, axis=0), mask=col_D < D)
