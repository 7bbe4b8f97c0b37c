"""Stochastic rounding: up or down at random, so that the mean over many steps is right.

Rounded to the nearest, every step of less than half the distance between two 16-bit numbers would be lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOST_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of float32, which a 16-bit number has no room for


def round_at_random(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """x (float32, any shape) as `dtype`: bfloat16 or float16, each time one of the two neighbours, or x as it is.

    The nearer one is likelier, in proportion, so that the mean is x.  What `dtype` holds exactly, infinity and NaN
    stay what they are.
    """
    if dtype == torch.float32:
        return x
    lost = 1 << _LOST_BITS[dtype]
    noise = torch.randint(lost, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    rounded = ((x.view(torch.int32) + noise) & -lost).view(torch.float32)
    if dtype == torch.float16:  # below 2^-14 its numbers are multiples of 2^-24
        fine = (x * 2**24 + noise / lost).floor() / 2**24
        rounded = torch.where(x.abs() < 2**-14, fine, rounded)
    return torch.where(x.isnan(), x, rounded).to(dtype)
