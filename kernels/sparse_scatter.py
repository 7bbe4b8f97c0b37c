"""Sparse-Gather's transpose: weighted rows of a source, summed where their hits point.

It gives the gradient of product keys where they are many, of which every one is hit about M * k / N times, and with the
products that are the gradient of the weights that of rows which came from their owners, every one of which is hit, and
of rows whose step is not a kernel's.

Shape suffixes: R rows of the result, D its width, G rows of the source, L hits of each; in the kernel S hits of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msn_dist.kernels.segments import (
    TileShape,
    find_begins,
    load_rows,
    load_tile,
    next_tile,
    segments_of,
    sum_segments,
    tile_shape,
)
from msn_dist.kernels.sizes import MAX_WIDTH, VARYING_ROWS
from msn_dist.kernels.sparse_bags import Bags, as_bags, check_table

SOURCE_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_SHARED = 8.0  # hits of a row that is sent once because hits share it


def scatter_sum(
    source_GD: Tensor, rows_GL: Tensor, weights_GL: Tensor | None, out_rows: int, *, shape: TileShape | None = None
) -> Tensor:
    """out_RD[r] = sum over the hits (g, l) with rows_GL[g, l] = r of weights_GL[g, l] * source_GD[g], float32.

    source_GD: float32, bfloat16 or float16.  rows_GL: int16, int32 or int64, in [0, out_rows), which is not looked at.
    weights_GL: any floating dtype, or None for 1.  Rows without a hit are zeros.  Sums repeat to the bit.
    `shape` overrides `tile_shape`.

    Raises ValueError for other shapes, dtypes and devices.
    """
    bags = _bags(source_GD, rows_GL, weights_GL)
    out_RD = torch.zeros(out_rows, source_GD.shape[1], dtype=torch.float32, device=source_GD.device)
    _launch(bags, source_GD, out_RD, None, None, out_rows, shape, once=False)
    return out_RD


def gather_backward(
    values_RD: Tensor,
    rows_GL: Tensor,
    weights_GL: Tensor | None,
    gradient_GD: Tensor,
    *,
    once: bool = False,
    all_hit: bool = True,
    shape: TileShape | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `sparse_gather(values_RD, rows_GL, weights_GL)` by its values [R, D] and its weights [G, L].

    Both are float32 and come of one pass, from gradient_GD.  values_RD: float32, bfloat16 or float16, contiguous.
    Every row must be hit, since others are not written; with `once` every row is hit by one hit, and nothing is sorted.
    Neither is looked at.  R may be another one in every step: what is compiled does not depend on it.  Without
    `all_hit` rows may have no hit, and R is taken to stay as it is: they get zeros, which costs a pass over all rows.
    The rest is as in `scatter_sum`.

    Raises ValueError for other shapes, dtypes and devices.
    """
    check_table(values_RD, SOURCE_TYPES)
    bags = _bags(gradient_GD, rows_GL, weights_GL)
    if gradient_GD.shape[1] != values_RD.shape[1] or gradient_GD.device != values_RD.device:
        raise ValueError(
            f"gradient is {list(gradient_GD.shape)} on {gradient_GD.device}: "
            f"give [G, {values_RD.shape[1]}] on {values_RD.device}"
        )
    begun = torch.empty_like if all_hit else torch.zeros_like
    out_RD = begun(values_RD, dtype=torch.float32)
    dot_GL = torch.empty(*rows_GL.shape, dtype=torch.float32, device=values_RD.device)
    shape = shape or tile_shape(values_RD.shape[1], 1.0 if once else _SHARED)
    _launch(bags, gradient_GD, out_RD, values_RD, dot_GL, VARYING_ROWS if all_hit else len(values_RD), shape, once)
    return out_RD, dot_GL


def _bags(source_GD: Tensor, rows_GL: Tensor, weights_GL: Tensor | None) -> Bags:
    if source_GD.dim() != 2 or source_GD.dtype not in SOURCE_TYPES or not 1 <= source_GD.shape[1] <= MAX_WIDTH:
        raise ValueError(
            f"source is {source_GD.dtype} {list(source_GD.shape)}: "
            f"give [G, 1 to {MAX_WIDTH}] of one of {', '.join(map(str, SOURCE_TYPES))}"
        )
    bags = as_bags(rows_GL, weights_GL, None, source_GD.device, (torch.int16, torch.int32, torch.int64))
    if bags.count != len(source_GD):
        raise ValueError(f"rows are of {bags.count} bags and source has {len(source_GD)} rows: give one bag a row")
    return bags


def _launch(
    bags: Bags,
    source_GD: Tensor,
    out_RD: Tensor,
    values_RD: Tensor | None,
    dot_GL: Tensor | None,
    rows: int,
    shape: TileShape | None,
    once: bool,
) -> None:
    if len(bags.rows_H) == 0:
        return
    segments = segments_of(bags, rows, source_GD.contiguous(), values_RD, dot_GL, shape, once)
    scatter_sum_kernel[segments.grid](
        *segments.pointers, values_RD, dot_GL, segments.partial_PD, out_RD, len(bags.rows_H), **segments.of_tiles
    )


@triton.jit(do_not_specialize=["hits"])
def scatter_sum_kernel(
    keys_ptr,
    order_ptr,
    bag_ptr,
    weights_ptr,
    source_ptr,
    values_ptr,
    dot_ptr,
    partial_ptr,
    out_ptr,
    hits,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SIZE: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
):
    col_D = tl.arange(0, D_PAD)
    begin_L = find_begins(keys_ptr, hits)
    start = next_tile(begin_L, 0, hits, S)
    while start < hits:
        hit_S, key_S, order_S, own_S, again_S, last_begin = load_tile(keys_ptr, order_ptr, start, hits, S)
        value_SD = tl.zeros([S, D_PAD], tl.float32)
        if dot_ptr is not None:
            value_SD = load_rows(values_ptr, key_S, own_S, col_D, D)
        sum_SD = sum_segments(
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
            D,
            D_PAD,
            SIZE,
            S,
            T,
        )
        to_SD = out_ptr + (key_S.to(tl.int64) * D)[:, None] + col_D[None, :]
        tl.store(to_SD, sum_SD, mask=own_S[:, None] & (col_D < D)[None, :])
        start = next_tile(begin_L, start + S, hits, S)
