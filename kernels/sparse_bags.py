"""Bags of hits as the sparse kernels take them: uniform, L hits each, or jagged, cut by offsets.

Shape suffixes: R rows of a value table, D its width, G bags, H hits (all bags' entries one after the other),
L hits of every bag where they are equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from msn_dist.kernels.sizes import MAX_WIDTH

ROW_TYPES = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Bags:
    """Hits of `count` bags: hits size * g to size * (g + 1) - 1 are bag g's, or offsets[g] to offsets[g + 1] - 1."""

    rows_H: Tensor
    weights_H: Tensor | None
    offsets_G1: Tensor | None
    count: int
    size: int  # 0 where offsets tell


def as_bags(
    rows: Tensor,
    weights: Tensor | None,
    offsets_G1: Tensor | None,
    device: torch.device,
    row_types: tuple[torch.dtype, ...] = ROW_TYPES,
) -> Bags:
    """Bags of rows [G, L] (or [G], one hit each), or of rows [H] with int64 offsets [G + 1]; weights are as the rows.

    Whether rows lie inside the table and offsets rise to H is not looked at: it would wait for the device.
    Raises ValueError for other shapes, dtypes and devices.
    """
    if rows.dtype not in row_types:
        raise ValueError(f"rows are {rows.dtype}: give one of {', '.join(map(str, row_types))}")
    if weights is not None and (weights.shape != rows.shape or not weights.is_floating_point()):
        raise ValueError(
            f"weights are {weights.dtype} {list(weights.shape)}: give floating ones, shaped as rows {list(rows.shape)}"
        )
    for name, tensor in (("rows", rows), ("weights", weights), ("offsets", offsets_G1)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} are on {tensor.device} and the values on {device}: move them there")
    flat_rows_H = rows.contiguous().view(-1)
    flat_weights_H = None if weights is None else weights.contiguous().view(-1)
    if offsets_G1 is not None:
        if rows.dim() != 1:
            raise ValueError(f"rows with offsets are {list(rows.shape)}: give them one after the other, [H]")
        if offsets_G1.dtype != torch.int64 or offsets_G1.dim() != 1 or len(offsets_G1) == 0:
            raise ValueError(f"offsets are {offsets_G1.dtype} {list(offsets_G1.shape)}: give int64 [G + 1]")
        return Bags(flat_rows_H, flat_weights_H, offsets_G1.contiguous(), len(offsets_G1) - 1, 0)
    if rows.dim() not in (1, 2):
        raise ValueError(f"rows without offsets are {list(rows.shape)}: give [G, L], or [G] for one hit a bag")
    size = rows.shape[1] if rows.dim() == 2 else 1
    if size == 0:  # no hits: the offsets of empty bags say so
        return Bags(flat_rows_H, flat_weights_H, rows.new_zeros(len(rows) + 1, dtype=torch.int64), len(rows), 0)
    return Bags(flat_rows_H, flat_weights_H, None, len(rows), size)


def check_table(values_RD: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises ValueError unless values_RD is a contiguous table of one of `dtypes`."""
    if values_RD.dim() != 2 or values_RD.dtype not in dtypes or not values_RD.is_contiguous():
        raise ValueError(
            f"values are {values_RD.dtype} {list(values_RD.shape)} with strides {list(values_RD.stride())}: "
            f"give a contiguous [R, D] of one of {', '.join(map(str, dtypes))}"
        )
    if not 1 <= values_RD.shape[1] <= MAX_WIDTH:
        raise ValueError(f"values are {values_RD.shape[1]} wide: the kernels take 1 to {MAX_WIDTH} columns")
