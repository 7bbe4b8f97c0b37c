"""How rows of float32 travel: `fp32`, `bf16`, `fp16` or `int8`, the last two scaled row by row.

| wire | bytes a row of width D | error of an element x in a row with largest magnitude m |
|---|---|---|
| fp32 | 4 D | none |
| bf16 | 2 D | 2^-8 |x| |
| fp16 | 2 D + 4 | 2^-11 |x| + 2^-25 m |
| int8 | D + 4 | m / 254 rounded to the nearest (values), below m / 127 rounded at random (gradients) |

Gradients in a mean over a large batch are far below the smallest fp16, hence the scale.  Random rounding
keeps the expected gradient what it was: rounding to the nearest would lose every element below m / 254, always.
A row that holds a NaN or an infinity arrives as NaN where it is scaled.

Shape suffixes: X rows, D width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Wire(Protocol):
    """Rows to what travels, and back; dimension 0 stays as it is."""

    def encode(self, rows_XD: Tensor) -> Tensor: ...

    def decode(self, message: Tensor) -> Tensor: ...


class Cast:
    """Rows in another floating type."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def encode(self, rows_XD: Tensor) -> Tensor:
        return rows_XD.to(self._dtype)

    def decode(self, message: Tensor) -> Tensor:
        return message.to(torch.float32)


class ScaledHalf:
    """fp16 elements in [-1, 1], then the row's scale in float32; uint8 [X, 2 D + 4]."""

    def encode(self, rows_XD: Tensor) -> Tensor:
        scale_X1 = _largest(rows_XD)
        return _side_by_side((rows_XD / scale_X1).to(torch.float16), scale_X1)

    def decode(self, message: Tensor) -> Tensor:
        unit_XD, scale_X1 = _apart(message, torch.float16)
        return unit_XD.to(torch.float32) * scale_X1


class ScaledByte:
    """int8 elements in [-127, 127], then the row's scale in float32; uint8 [X, D + 4].

    With a generator elements are rounded up or down at random, so that the mean is right; else to the nearest.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self._generator = generator

    def encode(self, rows_XD: Tensor) -> Tensor:
        scale_X1 = _largest(rows_XD) / 127
        steps_XD = rows_XD / scale_X1
        if self._generator is None:
            steps_XD = steps_XD.round_()
        else:
            steps_XD = steps_XD.add_(torch.rand(steps_XD.shape, generator=self._generator, device=rows_XD.device))
            steps_XD = steps_XD.floor_().clamp_(-127, 127)  # a sum may round up to 128
        return _side_by_side(steps_XD.to(torch.int8), scale_X1)

    def decode(self, message: Tensor) -> Tensor:
        steps_XD, scale_X1 = _apart(message, torch.int8)
        return steps_XD.to(torch.float32) * scale_X1


def wires(kind: str, device: torch.device, seed: int) -> tuple[Wire, Wire]:
    """(for values, for their gradients); `seed` is that of random rounding."""
    match kind:
        case "fp32":
            return Cast(torch.float32), Cast(torch.float32)
        case "bf16":
            return Cast(torch.bfloat16), Cast(torch.bfloat16)
        case "fp16":
            return ScaledHalf(), ScaledHalf()
        case "int8":
            return ScaledByte(), ScaledByte(torch.Generator(device).manual_seed(seed))
    raise ValueError(f"wire {kind!r} is none of fp32, bf16, fp16, int8")


def row_bytes(kind: str, dim: int) -> int:
    """Bytes that a row of width `dim` takes on the wire."""
    return {"fp32": 4 * dim, "bf16": 2 * dim, "fp16": 2 * dim + 4, "int8": dim + 4}[kind]


def _largest(rows_XD: Tensor) -> Tensor:
    """Largest magnitude of each row, above 0, so that a row of zeros divides."""
    return rows_XD.abs().amax(1, keepdim=True).clamp_(min=1e-30)


def _side_by_side(elements_XD: Tensor, scale_X1: Tensor) -> Tensor:
    return torch.cat([as_type(elements_XD, torch.uint8), as_type(scale_X1, torch.uint8)], dim=1)


def _apart(message: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return as_type(message[:, :-4], dtype), as_type(message[:, -4:], torch.float32)


def as_type(columns: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of some columns, their bytes read as another type."""
    # not contiguous(), which leaves a single row as it is, at a stride that no view accepts
    return columns.clone(memory_format=torch.contiguous_format).view(dtype)
