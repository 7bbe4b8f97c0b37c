"""Sparse-Gather: weighted sums of a table's rows over bags of hits, and the gate by their tanh, in one kernel.

A thread holds 16 bytes of a row for the hits of a block of hits, so that many reads are under way at once and most of
the sum over hits stays inside the thread.

Shape suffixes: R rows of the table, D its width, G bags, H hits, L hits of every bag where they are equal;
in the kernel B bags of one program and J hits of one block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from msn_dist.kernels.gate import tanh
from msn_dist.kernels.sparse_bags import Bags, as_bags, check_table

VALUE_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)
OUT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class GatherShape:
    """How a launch is cut: bags of a program, hits read at once, warps of a program."""

    bags: int
    hits: int
    warps: int


def launch_shape(width: int, size: int, value_bytes: int) -> GatherShape:
    """The launch for rows of `width` values of `value_bytes`, `size` hits a bag (0: jagged)."""
    threads = max(1, triton.next_power_of_2(width) * value_bytes // 16)  # that read one row, 16 bytes each
    warps = min(max(threads // 32, 1), 4)
    hits = min(triton.next_power_of_2(size), 32) if size else 8
    hits = min(hits, max(1, 32 * 32 * warps // threads))  # 32 reads of a thread
    idle = 32 * warps // (threads * (hits if size else 1))
    return GatherShape(max(1, 8 // threads, idle), hits, warps)


@triton.jit(do_not_specialize=["bags"])
def sparse_gather_kernel(
    values_ptr,
    scale_ptr,
    rows_ptr,
    weights_ptr,
    offsets_ptr,
    x_ptr,
    out_ptr,
    bags,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SIZE: tl.constexpr,  # hits of every bag, 0 where the offsets tell
    BAGS: tl.constexpr,
    HITS: tl.constexpr,
    EVICT: tl.constexpr,  # L2 policy of the values
):
    bag_B = tl.program_id(0) * BAGS + tl.arange(0, BAGS)
    col_D = tl.arange(0, D_PAD)
    hit_J = tl.arange(0, HITS)
    real_B = bag_B < bags
    # Threads past the last bag repeat it, which costs nothing and needs no masks.
    some_bag_B = tl.minimum(bag_B, bags - 1).to(tl.int64)
    if SIZE > 0:
        first_B = some_bag_B * SIZE
        longest = SIZE
    else:
        first_B = tl.load(offsets_ptr + some_bag_B)
        length_B = (tl.load(offsets_ptr + some_bag_B + 1) - first_B).to(tl.int32)
        longest = tl.max(length_B, 0)

    pooled_BD = tl.zeros([BAGS, D_PAD], tl.float32)
    for start in range(0, longest, HITS):
        if SIZE == 0:
            take_BJ = (start + hit_J)[None, :] < length_B[:, None]
        elif SIZE % HITS != 0:
            take_BJ = tl.broadcast_to((start + hit_J < SIZE)[None, :], [BAGS, HITS])
        else:
            take_BJ = tl.full([BAGS, HITS], 1, tl.int1)
        at_BJ = first_B[:, None] + start + hit_J[None, :]
        row_BJ = tl.load(rows_ptr + at_BJ, mask=take_BJ, other=0, eviction_policy="evict_first").to(tl.int64)
        weight_BJ = tl.full([BAGS, HITS], 1.0, tl.float32)
        if weights_ptr is not None:
            weight_BJ = tl.load(weights_ptr + at_BJ, mask=take_BJ, other=0.0, eviction_policy="evict_first").to(
                tl.float32
            )
        if scale_ptr is not None:
            weight_BJ *= tl.load(scale_ptr + row_BJ, mask=take_BJ, other=0.0)
        value_BJD = tl.load(
            values_ptr + (row_BJ * D)[:, :, None] + col_D[None, None, :],
            mask=take_BJ[:, :, None] & (col_D < D)[None, None, :],
            other=0.0,
            eviction_policy=EVICT,
        )
        pooled_BD += tl.sum(value_BJD.to(tl.float32) * weight_BJ[:, :, None], axis=1)

    to_BD = some_bag_B[:, None] * D + col_D[None, :]
    keep_BD = real_B[:, None] & (col_D < D)[None, :]
    if x_ptr is not None:
        pooled_BD = tl.load(x_ptr + to_BD, mask=keep_BD, other=0.0).to(tl.float32) * tanh(pooled_BD)
    tl.store(out_ptr + to_BD, pooled_BD.to(out_ptr.dtype.element_ty), mask=keep_BD, cache_modifier=".cs")


def sparse_gather(
    values_RD: Tensor,
    rows: Tensor,
    weights: Tensor | None = None,
    offsets_G1: Tensor | None = None,
    *,
    scale_R: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    shape: GatherShape | None = None,
) -> Tensor:
    """Sums of weight * row over the hits of each bag [G, D], in `out_dtype` (float32, bfloat16 or float16).

    values_RD: float32, bfloat16, float16, int8 or float8_e4m3fn, contiguous, 1 to 4,096 wide; a value is
    scale_R[row] * values_RD[row] where scales (float32) are given, as int8 needs them.  rows: int32 or int64, [G, L]
    for bags of L hits each, [G] for one hit each, or [H] with offsets_G1 (int64): bag g then holds hits offsets[g] to
    offsets[g + 1] - 1.  weights: any floating dtype, shaped as the rows; None weighs every hit 1.  Sums are float32,
    added up in an order that the launch shape alone decides, so that runs repeat to the bit; an empty bag gives zeros,
    and a row that holds NaN touches its own bags alone.  Rows must lie in the table: this is not looked at.  `shape`
    overrides `launch_shape`.

    Raises ValueError for other shapes, dtypes and devices.
    """
    check_table(values_RD, VALUE_TYPES)
    if out_dtype not in OUT_TYPES:
        raise ValueError(f"out_dtype is {out_dtype}: give one of {', '.join(map(str, OUT_TYPES))}")
    bags = as_bags(rows, weights, offsets_G1, values_RD.device)
    out_GD = torch.empty(bags.count, values_RD.shape[1], dtype=out_dtype, device=values_RD.device)
    _launch(values_RD, scale_R, bags, None, out_GD, shape)
    return out_GD


def gated_sparse_gather(
    x_GD: Tensor,
    values_RD: Tensor,
    rows: Tensor,
    weights: Tensor | None = None,
    offsets_G1: Tensor | None = None,
    *,
    scale_R: Tensor | None = None,
    shape: GatherShape | None = None,
) -> Tensor:
    """x * tanh(sparse_gather(...)) [G, D] in the dtype of x (float32, bfloat16 or float16): the gate of a token.

    The sums do not travel through memory, and enter the gate as float32.  Arguments and errors are those of
    `sparse_gather`.
    """
    check_table(values_RD, VALUE_TYPES)
    bags = as_bags(rows, weights, offsets_G1, values_RD.device)
    expected = (bags.count, values_RD.shape[1])
    if x_GD.shape != expected or x_GD.dtype not in OUT_TYPES or x_GD.device != values_RD.device:
        raise ValueError(
            f"x is {x_GD.dtype} {list(x_GD.shape)} on {x_GD.device}: "
            f"give floating {list(expected)} (bags, width) on {values_RD.device}"
        )
    x_GD = x_GD.contiguous()
    out_GD = torch.empty_like(x_GD)
    _launch(values_RD, scale_R, bags, x_GD, out_GD, shape)
    return out_GD


def _launch(
    values_RD: Tensor,
    scale_R: Tensor | None,
    bags: Bags,
    x_GD: Tensor | None,
    out_GD: Tensor,
    shape: GatherShape | None,
) -> None:
    width = values_RD.shape[1]
    if values_RD.dtype == torch.float8_e4m3fn and values_RD.is_cuda:
        capability = torch.cuda.get_device_capability(values_RD.device)
        if capability < (8, 9):
            raise ValueError(
                "values are float8_e4m3fn, which takes compute capability 8.9, and this GPU has "
                f"{capability[0]}.{capability[1]}: give int8 with scales"
            )
    if values_RD.dtype == torch.int8 and scale_R is None:
        raise ValueError("values are int8 and have no scales: give scale_R, float32 [R]")
    if scale_R is not None:
        if scale_R.dtype != torch.float32 or scale_R.shape != values_RD.shape[:1] or not scale_R.is_contiguous():
            raise ValueError(
                f"scale_R is {scale_R.dtype} {list(scale_R.shape)}: give contiguous float32 [{len(values_RD)}]"
            )
        if scale_R.device != values_RD.device:
            raise ValueError(f"scale_R is on {scale_R.device} and the values on {values_RD.device}: move it there")
    if bags.count == 0:
        return
    shape = shape or launch_shape(width, bags.size, values_RD.element_size())
    sparse_gather_kernel[(triton.cdiv(bags.count, shape.bags),)](
        values_RD,
        scale_R,
        bags.rows_H,
        bags.weights_H,
        bags.offsets_G1,
        x_GD,
        out_GD,
        bags.count,
        D=width,
        D_PAD=triton.next_power_of_2(width),
        SIZE=bags.size,
        BAGS=shape.bags,
        HITS=shape.hits,
        # Rows of one cache line gain where hits are uniform, and lose nothing where they are not; wider ones lose.
        EVICT="evict_first" if width * values_RD.element_size() <= 128 else "",
        num_warps=shape.warps,
    )
