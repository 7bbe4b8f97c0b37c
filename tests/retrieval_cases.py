"""Operands of a retrieval, and the scores of any slots.

Shape suffixes: A = 2 axes, M queries, H heads, N sub-keys of an axis, E key width of one half, K hits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from msn_dist.kernels import retrieval
from triton_device import DEVICE

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
Operands = tuple[Tensor, Tensor, Tensor, Tensor]  # row and column queries_MHE, row and column keys_HNE
Found = tuple[Tensor, Tensor]  # slots_MHK, weights_MHK


def operands(queries: int, heads: int, sub_keys: int, width: int, dtype: torch.dtype = FP32, seed: int = 0) -> Operands:
    """Normal values, which is what LayerNorm leaves."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(queries, heads, width)] * 2 + [(heads, sub_keys, width)] * 2
    return tuple(torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)


def joined(given: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """queries_AMHE and keys_AHNE, as a retrieval takes them."""
    return torch.stack(list(given[:2])), torch.stack(list(given[2:]))


def retrieve(*given: Any) -> Found:
    """`retrieval.retrieve` of Operands, k and tau."""
    return retrieval.retrieve(*joined(given[:4]), *given[4:])


def retrieve_backward(*given: Any) -> list[Tensor]:
    """`retrieval.retrieve_backward` of Operands and the rest: gradients of either axis's queries and keys."""
    of_queries_AMHE, of_keys_AHNE = retrieval.retrieve_backward(*joined(given[:4]), *given[4:])
    return [*of_queries_AMHE, *of_keys_AHNE]


def scores_of(slots_MHK: Tensor, given: Sequence[Tensor], tau: float) -> Tensor:
    """scores_MHK of any slots in the dtype of `given`, differentiable."""
    sub_keys, width = given[2].shape[1:]
    scores_MHK = 0
    for queries_MHE, keys_HNE, keys_MHK in zip(
        given[:2], given[2:], (slots_MHK // sub_keys, slots_MHK % sub_keys), strict=True
    ):
        first_H = torch.arange(0, keys_HNE.shape[0] * sub_keys, sub_keys, device=slots_MHK.device)
        keys_MHKE = keys_HNE.reshape(-1, width)[first_H[:, None] + keys_MHK]
        scores_MHK = scores_MHK + (queries_MHE[:, :, None] * keys_MHKE).sum(-1)
    return scores_MHK * tau


def assert_same(one: Found, other: Found) -> None:
    """To the bit, NaN included."""
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1].view(torch.int32), other[1].view(torch.int32))
