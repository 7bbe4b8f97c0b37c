"""Sparse-Gather's transpose for a small table: weighted rows of a source, summed where their hits point.

It gives the gradient of product keys where they are many; every one is hit about M * k / N times.

Shape suffixes: R rows of the result, D its width, G rows of the source, L hits of each; in the kernel S hits of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msn_dist.kernels.segments import TileShape, load_tile, segments_of, sum_segments
from msn_dist.kernels.sparse_bags import as_bags

SOURCE_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def scatter_sum(
    source_GD: Tensor, rows_GL: Tensor, weights_GL: Tensor | None, out_rows: int, *, shape: TileShape | None = None
) -> Tensor:
    """out_RD[r] = sum over the hits (g, l) with rows_GL[g, l] = r of weights_GL[g, l] * source_GD[g], float32.

    source_GD: float32, bfloat16 or float16.  rows_GL: int16, int32 or int64, in [0, out_rows), which is not looked at.
    weights_GL: any floating dtype, or None for 1.  Rows without a hit are zeros.  Sums repeat to the bit.
    `shape` overrides `tile_shape`.

    Raises ValueError for other shapes, dtypes and devices.
    """
    if source_GD.dim() != 2 or source_GD.dtype not in SOURCE_TYPES or not 1 <= source_GD.shape[1] <= 4096:
        raise ValueError(
            f"source is {source_GD.dtype} {list(source_GD.shape)}: "
            f"give [G, 1 to 4096] of one of {', '.join(map(str, SOURCE_TYPES))}"
        )
    bags = as_bags(rows_GL, weights_GL, None, source_GD.device, (torch.int16, torch.int32, torch.int64))
    if bags.count != len(source_GD):
        raise ValueError(f"rows are of {bags.count} bags and source has {len(source_GD)} rows: give one bag a row")
    out_RD = torch.zeros(out_rows, source_GD.shape[1], dtype=torch.float32, device=source_GD.device)
    if len(bags.rows_H):
        segments = segments_of(bags, out_rows, source_GD.contiguous(), shape=shape)
        scatter_sum_kernel[segments.grid](
            *segments.pointers, segments.partial_PD, out_RD, len(bags.rows_H), **segments.constants
        )
    return out_RD


@triton.jit(do_not_specialize=["hits"])
def scatter_sum_kernel(
    keys_ptr,
    order_ptr,
    bag_ptr,
    weights_ptr,
    source_ptr,
    partial_ptr,
    out_ptr,
    hits,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SIZE: tl.constexpr,
    S: tl.constexpr,
):
    start, hit_S, key_S, order_S, own_S, again_S, last_begin = load_tile(keys_ptr, order_ptr, hits, S)
    if last_begin < 0:
        return
    col_D = tl.arange(0, D_PAD)
    nothing_SD = tl.zeros([S, D_PAD], tl.float32)
    sum_SD = sum_segments(
        keys_ptr,
        order_ptr,
        bag_ptr,
        weights_ptr,
        source_ptr,
        None,
        None,
        partial_ptr,
        hits,
        start,
        hit_S,
        key_S,
        order_S,
        own_S,
        again_S,
        last_begin,
        nothing_SD,
        col_D,
        D,
        D_PAD,
        SIZE,
        S,
    )
    to_SD = out_ptr + (key_S.to(tl.int64) * D)[:, None] + col_D[None, :]
    tl.store(to_SD, sum_SD, mask=own_S[:, None] & (col_D < D)[None, :])
