"""A row and its weight side by side: the hits travel as one message.

Shape suffixes: H hits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msn_dist.sharding.wire import as_type


class HitWire:
    """Weights to uint8 [H, bytes of a row and a weight], with the rows of `rows_H`.

    `decode` returns the weights, float32, and leaves the rows that came with them in `rows_H`.
    """

    def __init__(self, rows_H: Tensor, weight_dtype: torch.dtype) -> None:
        self.rows_H, self._row_dtype, self._weight_dtype = rows_H, rows_H.dtype, weight_dtype

    def encode(self, weights_H: Tensor) -> Tensor:
        # in words of the smaller part, as bytes would be copied one by one
        word = torch.int32 if self._weight_dtype.itemsize == 4 else torch.int16
        parts = self.rows_H, weights_H.to(self._weight_dtype)
        words = [part.view(word).view(len(part), part.dtype.itemsize // word.itemsize) for part in parts]
        return torch.cat(words, dim=1).view(torch.uint8)

    def decode(self, message: Tensor) -> Tensor:
        row_bytes = self._row_dtype.itemsize
        self.rows_H = as_type(message[:, :row_bytes], self._row_dtype).flatten()
        return as_type(message[:, row_bytes:], self._weight_dtype).flatten().to(torch.float32)


def weight_dtype(wire: str) -> torch.dtype:
    """float32 where values travel so, else 16 bits: fp16 for fp16, as weights lie in [0, 1], and bf16."""
    return {"fp32": torch.float32, "fp16": torch.float16}.get(wire, torch.bfloat16)
