"""Bags of slots drawn at random, as the planner takes loads to be."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.exchange_slots import first_distinct
from msn_dist.planner.load import zipf


def drawn_bags(sub_keys: int, bags: int, hits: int, exponent: float, seed: int) -> Tensor:
    """slots_ML = I * N + J, distinct in a bag; I and J by Zipf's law (0: uniform), renamed at random."""
    generator = torch.Generator().manual_seed(seed)
    i_MC, j_MC = (
        torch.randperm(sub_keys, generator=generator)[
            zipf(sub_keys, exponent).multinomial(bags * 6 * hits, replacement=True, generator=generator)
        ].view(bags, -1)
        for _ in range(2)
    )
    return first_distinct(i_MC * sub_keys + j_MC, hits)
