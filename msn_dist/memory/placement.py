"""Where a slot lies in the table, and what it holds at the start: the same at every world size.

Slots that share their first sub-key are neighbours (slot = I * N + J), so contiguous blocks would
make the owner of a popular sub-key a hot rank.  An affine bijection of [0, n) spreads them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_PIECE = 20  # bits; products of a piece and a slot stay under 2^63 for n up to 2^42
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: successive multiples are spread evenly


@dataclass(frozen=True)
class Placement:
    """row = (factor * slot + shift) mod slots; factor is coprime to slots."""

    slots: int
    factor: int = 1
    shift: int = 0

    @staticmethod
    def permuted(slots: int) -> Placement:
        """The bijection that tables use; a function of `slots` alone, so a checkpoint needs no copy of it."""
        factor = max(1, slots * _GOLDEN >> 64)
        while math.gcd(factor, slots) != 1:
            factor += 1
        return Placement(slots, factor % slots if slots > 1 else 0, slots // 3)

    def row_of(self, slots: Tensor) -> Tensor:
        """Row of each slot; int64, any shape."""
        return _affine_mod(self.factor, slots, self.shift, self.slots)

    def slot_of(self, rows: Tensor) -> Tensor:
        """Slot of each row: the inverse of `row_of`."""
        inverse = pow(self.factor, -1, self.slots)
        return _affine_mod(inverse, rows, -inverse * self.shift % self.slots, self.slots)


def initial_values(
    placement: Placement, first_row: int, out_RC: Tensor, *, std: float, seed: int, first_column: int = 0
) -> None:
    """Fill out_RC with the initial values of the rows and columns that begin there.

    A value depends on (seed, slot, column) alone: it is the sum of four 16-bit uniforms of one
    hash, scaled to mean 0 and standard deviation `std` (bounded at 3.5 std).  Integer arithmetic and one
    multiplication: bit-identical on every device, in every chunk, at every world size.
    """
    rows, columns = out_RC.shape
    column_C = torch.arange(first_column, first_column + columns, device=out_RC.device)
    chunk = max(1, 2**22 // columns)
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        slot_X = placement.slot_of(torch.arange(first_row + start, first_row + stop, device=out_RC.device))
        bits_XC = _hash(_hash(slot_X + _signed(seed * _GOLDEN))[:, None] + column_C)
        sum_XC = sum((bits_XC >> shift) & 0xFFFF for shift in (0, 16, 32, 48))
        scale = std / math.sqrt((2**32 - 1) / 3)  # variance of one uniform on 0..65535: (2^32 - 1) / 12
        out_RC[start:stop] = ((sum_XC - 2 * 0xFFFF).to(torch.float32) * scale).to(out_RC.dtype)


def _affine_mod(factor: int, slots: Tensor, shift: int, modulus: int) -> Tensor:
    """(factor * slots + shift) mod modulus of slots in [0, modulus), in int64 without overflow."""
    if factor * modulus + shift < 2**63:
        return (slots * factor + shift) % modulus
    if modulus > 2**42:
        raise ValueError(f"{modulus} slots: placement is exact up to 2**42")
    result = torch.zeros_like(slots)
    for bits in (2 * _PIECE, _PIECE, 0):  # Horner's rule on 20-bit pieces
        piece = (slots >> bits) & (2**_PIECE - 1)
        result = ((result << _PIECE) % modulus + piece * factor % modulus) % modulus
    return (result + shift) % modulus


def _hash(x: Tensor) -> Tensor:
    """splitmix64's mixing function on int64, which wraps as uint64 does."""
    x = x + _signed(_GOLDEN)
    x = (x ^ _logical_shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _logical_shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _logical_shift(x, 31)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _signed(x: int) -> int:
    x %= 2**64
    return x - 2**64 if x >= 2**63 else x
