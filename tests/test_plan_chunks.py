"""The planner and `memory.chunks`: what a chunk is, what chunks take, and what of the exchange they hide."""

from __future__ import annotations

import pytest
import torch
from test_planning import situation

from msn_dist.planner.dense_trace import trace_step
from msn_dist.planner.search import Search
from msn_dist.planner.storage import rank_storage


def test_a_batch_is_planned_in_the_chunks_that_a_memory_makes_of_it() -> None:
    here = situation(1, 8, rows=1030, chunks=4)
    tokens = here.config.model.tokens
    assert here.load.chunks == tuple(tokens * len(part) for part in torch.empty(1030).tensor_split(4))
    assert here.load.bags == situation(1, 8, rows=1030).load.bags == 1030 * tokens


def test_a_plan_has_room_for_the_rows_of_every_chunk() -> None:
    here = situation(1, 8, sub_keys=128, chunks=4)
    unique = here.layout("row_gather_unique", "fp32", "fp32")
    (planned,) = (one for one in Search(here).priced() if one.layout == unique)
    assert here.load.rows(1) < here.load.rows_by_chunk(1) / 2
    trace = trace_step(here.config, here.schema, here.rows, "cuda")
    alike, *_ = rank_storage(here.config, here.schema, unique, trace)  # what `exchange_storage` takes of each chunk
    assert planned.storage_W[0].activations == pytest.approx(alike.activations, rel=0.01)
