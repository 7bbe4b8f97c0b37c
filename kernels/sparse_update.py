"""Sparse-Gather's backward with the optimizer in it: gradients of the weights, and rows that step in place.

A row's gradient, the sum over all its hits of weight * gradient of the bag, exists in registers alone: a row that was
hit is read once and written once, and nothing as large as the table or as hits * width is allocated.

Shape suffixes: R rows of the table, D its width, G bags, H hits; in the kernel S hits of one tile (see segments.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from msn_dist.kernels.segments import TileShape, find_begins, load_rows, load_tile, next_tile, segments_of, sum_segments
from msn_dist.kernels.sparse_bags import as_bags, check_table

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sgd:
    """v -= lr * g."""

    lr: float


@dataclass(frozen=True)
class RowwiseAdagrad:
    """m += mean_d(g^2); v -= lr * g / (sqrt(m) + eps), as FBGEMM's EXACT_ROWWISE_ADAGRAD."""

    lr: float
    eps: float = 1e-8


@dataclass(frozen=True)
class RowwiseAdam:
    """f = beta1 f + (1 - beta1) g; m = beta2 m + (1 - beta2) mean_d(g^2); v -= lr * f' / (sqrt(m') + eps).

    f' = f / (1 - beta1^step) and m' = m / (1 - beta2^step), as FBGEMM's PARTIAL_ROWWISE_ADAM; `step` counts from 1.
    A row without a hit keeps its moments too.
    """

    lr: float
    step: int
    eps: float = 1e-8
    beta1: float = 0.9
    beta2: float = 0.999


Rule = Sgd | RowwiseAdagrad | RowwiseAdam


@dataclass(frozen=True)
class RowState:
    """What a rule keeps: moment_R (float32) for Adagrad and Adam, first_RD (float32 or as the values) for Adam."""

    moment_R: Tensor | None = None
    first_RD: Tensor | None = None


def sparse_update(
    values_RD: Tensor,
    state: RowState,
    rows: Tensor,
    weights: Tensor | None,
    offsets_G1: Tensor | None,
    gradient_GD: Tensor,
    rule: Rule,
    *,
    of_weights: bool = True,
    rounding_seed: int | None = None,
    shape: TileShape | None = None,
) -> Tensor | None:
    """One optimizer step, in place, for the rows that were hit; gradients of the weights, shaped as rows, float32.

    gradient_GD (float32, bfloat16 or float16) is the gradient of `sparse_gather(values_RD, rows, weights, offsets_G1)`.
    The gradient of a row, g, is the sum over all its hits of weight * gradient_GD[bag], in float32, as is the step;
    other rows and their state are not touched.  That of a hit's weight is <gradient_GD[bag], values_RD[row]>, with the
    values before the step; None is returned with `of_weights=False`.

    values_RD: float32, bfloat16 or float16, contiguous, 1 to 4,096 wide.  rows, weights, offsets: see `sparse_gather`.
    With `rounding_seed`, 16-bit values are rounded up or down at random so that the mean is exact; seed, row and column
    alone decide, so give another seed for every step.  Runs repeat to the bit.  `shape` overrides `tile_shape`.

    Raises ValueError for other shapes, dtypes and devices, and where the state is not the rule's.
    """
    check_table(values_RD, FLOAT_TYPES)
    bags = as_bags(rows, weights, offsets_G1, values_RD.device)
    _check_gradient(gradient_GD, bags.count, values_RD)
    _check_state(state, rule, values_RD)
    if rounding_seed is not None and values_RD.dtype == torch.float32:
        raise ValueError("rounding_seed is given and the values are float32, which are not rounded: leave it None")
    hits = len(bags.rows_H)
    dot_H = torch.empty(hits, dtype=torch.float32, device=values_RD.device) if of_weights else None
    if hits:
        segments = segments_of(bags, len(values_RD), gradient_GD.contiguous(), values_RD, dot_H, shape)
        update_rows_kernel[segments.grid](
            *segments.pointers,
            values_RD,
            dot_H,
            segments.partial_PD,
            state.moment_R,
            state.first_RD,
            hits,
            *map(float, _numbers(rule)),
            rounding_seed or 0,
            RULE=type(rule).__name__,
            ROUND=rounding_seed is not None,
            **segments.of_tiles,
        )
    return None if dot_H is None else dot_H.view(rows.shape)


def _numbers(rule: Rule) -> tuple[float, ...]:
    """lr, eps, beta1, beta2 and the two bias corrections as the kernel takes them."""
    if isinstance(rule, Sgd):
        return rule.lr, 0.0, 0.0, 0.0, 1.0, 1.0
    if isinstance(rule, RowwiseAdagrad):
        return rule.lr, rule.eps, 0.0, 0.0, 1.0, 1.0
    corrections = 1.0 / (1.0 - rule.beta1**rule.step), 1.0 / (1.0 - rule.beta2**rule.step)
    return rule.lr, rule.eps, rule.beta1, rule.beta2, *corrections


def _check_gradient(gradient_GD: Tensor, bags: int, values_RD: Tensor) -> None:
    expected = (bags, values_RD.shape[1])
    if gradient_GD.shape != expected or gradient_GD.dtype not in FLOAT_TYPES or gradient_GD.device != values_RD.device:
        raise ValueError(
            f"gradient is {gradient_GD.dtype} {list(gradient_GD.shape)} on {gradient_GD.device}: "
            f"give floating {list(expected)} (bags, width) on {values_RD.device}"
        )


def _check_state(state: RowState, rule: Rule, values_RD: Tensor) -> None:
    if isinstance(rule, RowwiseAdam) and rule.step < 1:
        raise ValueError(f"step is {rule.step}: the first one is 1")
    wanted = {
        "moment_R": (isinstance(rule, RowwiseAdagrad | RowwiseAdam), values_RD.shape[:1], (torch.float32,)),
        "first_RD": (isinstance(rule, RowwiseAdam), values_RD.shape, (torch.float32, values_RD.dtype)),
    }
    for name, (needed, expected, dtypes) in wanted.items():
        tensor = getattr(state, name)
        if not needed:
            if tensor is not None:
                raise ValueError(f"{name} is given, and {type(rule).__name__} keeps none: leave it None")
        elif tensor is None:
            raise ValueError(f"{name} is None, and {type(rule).__name__} needs it: give {dtypes[0]} {list(expected)}")
        elif (
            tensor.shape != expected
            or tensor.dtype not in dtypes
            or tensor.device != values_RD.device
            or not tensor.is_contiguous()
        ):
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}: "
                f"give contiguous {dtypes[0]} {list(expected)} on {values_RD.device}"
            )


@triton.jit
def round_at_random(x_SD, dtype: tl.constexpr, seed, row_S, col_D):
    """float32 to one of the two 16-bit neighbours, so that the mean over seeds is x."""
    # Philox costs 60 instructions, so it is asked once a row; a mixer of 32 bits spreads it over the columns.
    bits_SD = tl.randint(seed, row_S).to(tl.uint32, bitcast=True)[:, None] ^ (col_D.to(tl.uint32) * 0x9E3779B9)[None, :]
    bits_SD = (bits_SD ^ (bits_SD >> 16)) * 0x85EBCA6B
    bits_SD = (bits_SD ^ (bits_SD >> 13)) * 0xC2B2AE35
    bits_SD = bits_SD ^ (bits_SD >> 16)
    lost: tl.constexpr = 0xFFFF if dtype == tl.bfloat16 else 0x1FFF  # the bits that a 16-bit number has no room for
    up_SD = ((x_SD.to(tl.uint32, bitcast=True) + (bits_SD & lost)) & (0xFFFFFFFF - lost)).to(tl.float32, bitcast=True)
    if dtype == tl.float16:
        # Below 2^-14 float16 is a grid of 2^-24.
        fine_SD = tl.floor(x_SD * 16777216.0 + (bits_SD & lost).to(tl.float32) / (lost + 1)) / 16777216.0
        up_SD = tl.where(tl.abs(x_SD) < 6.103515625e-05, fine_SD, up_SD)
    return tl.where(x_SD == x_SD, up_SD, x_SD).to(dtype)


@triton.jit(do_not_specialize=["hits", "seed"])
def update_rows_kernel(
    keys_ptr,
    order_ptr,
    bag_ptr,
    weights_ptr,
    source_ptr,
    values_ptr,
    dot_ptr,
    partial_ptr,
    moment_ptr,
    first_ptr,
    hits,
    lr,
    eps,
    beta1,
    beta2,
    correction1,
    correction2,
    seed,
    RULE: tl.constexpr,
    ROUND: tl.constexpr,
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
        row_S = key_S.to(tl.int64)
        value_SD = load_rows(values_ptr, row_S, own_S, col_D, D)
        if moment_ptr is not None:
            moment_S = tl.load(moment_ptr + row_S, mask=own_S, other=0.0)
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
        mean_square_S = tl.sum(sum_SD * sum_SD, axis=1) / D
        to_SD = (row_S * D)[:, None] + col_D[None, :]
        keep_SD = own_S[:, None] & (col_D < D)[None, :]
        if RULE == "Sgd":
            change_SD = lr * sum_SD
        elif RULE == "RowwiseAdagrad":
            moment_S += mean_square_S
            change_SD = sum_SD * (lr / (tl.sqrt_rn(moment_S) + eps))[:, None]
        else:
            tl.static_assert(RULE == "RowwiseAdam")
            first_SD = tl.load(first_ptr + to_SD, mask=keep_SD, other=0.0).to(tl.float32)
            first_SD = beta1 * first_SD + (1 - beta1) * sum_SD
            moment_S = beta2 * moment_S + (1 - beta2) * mean_square_S
            change_SD = first_SD * (lr * correction1 / (tl.sqrt_rn(moment_S * correction2) + eps))[:, None]
        value_SD = value_SD.to(tl.float32) - change_SD

        tl.debug_barrier()  # a row and its moment are read by several threads, and written by one of them
        if moment_ptr is not None:
            tl.store(moment_ptr + row_S, moment_S, mask=own_S)
        if first_ptr is not None:
            tl.store(first_ptr + to_SD, first_SD.to(first_ptr.dtype.element_ty), mask=keep_SD)
        if ROUND:
            value_SD = round_at_random(value_SD, values_ptr.dtype.element_ty, seed, row_S, col_D)
        tl.store(values_ptr + to_SD, value_SD.to(values_ptr.dtype.element_ty), mask=keep_SD, cache_modifier=".cs")
        start = next_tile(begin_L, start + S, hits, S)
