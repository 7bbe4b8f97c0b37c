"""The planner and `memory.chunks`: what a chunk is, what chunks take, and what of the exchange they hide."""

from __future__ import annotations

import torch
from test_planning import situation


def test_a_batch_is_planned_in_the_chunks_that_a_memory_makes_of_it() -> None:
    here = situation(1, 8, rows=1030, chunks=4)
    tokens = here.config.model.tokens
    assert here.load.chunks == tuple(tokens * len(part) for part in torch.empty(1030).tensor_split(4))
    assert here.load.bags == situation(1, 8, rows=1030).load.bags == 1030 * tokens
