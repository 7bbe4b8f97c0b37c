"""The planner and `memory.chunks`: what a chunk is, what chunks take, and what of the exchange they hide."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from test_plan_groups import NOTHING_ELSE
from test_planning import situation

from msn_dist.errors import InputError
from msn_dist.planner.cost import ModelTime, Phase, message_seconds, operator_seconds, passes_seconds, step_time
from msn_dist.planner.dense_trace import trace_step
from msn_dist.planner.exchange_work import exchange_work
from msn_dist.planner.load import expected_bytes
from msn_dist.planner.machine import Machine
from msn_dist.planner.search import Search
from msn_dist.planner.situation import Situation
from msn_dist.planner.storage import rank_storage


def test_a_batch_is_planned_in_the_chunks_that_a_memory_makes_of_it() -> None:
    here = situation(1, 8, rows=1030, chunks=4)
    tokens = here.config.model.tokens
    assert here.load.chunks == tuple(tokens * len(part) for part in torch.empty(1030).tensor_split(4))
    assert here.load.bags == situation(1, 8, rows=1030).load.bags == 1030 * tokens


def test_a_batch_whose_smallest_share_has_fewer_rows_than_chunks_is_refused() -> None:
    here = situation(1, 2, rows=4, chunks=4)
    data = here.config.data.model_copy(update={"batch_size": 7})
    with pytest.raises(InputError, match="chunks"):
        here.with_config(here.config.model_copy(update={"data": data}))


def test_torch_weights_rows_that_are_asked_for_at_home_only() -> None:
    here = situation(1, 8, lookup="reference")
    passes = {
        strategy: exchange_work(here.layout(strategy, "fp32", "fp32"), here.load, here.dim)
        for strategy in ("row_pooled", "row_gather")
    }
    hits = here.load.bags * here.load.hits * here.load.owner_load(8)
    row = 4 * here.dim
    gathered, added = 2 * hits * row, 3 * hits * row
    assert gathered in passes["row_gather"].forward and added in passes["row_gather"].backward
    assert added in passes["row_pooled"].forward and added not in passes["row_gather"].forward
    assert passes["row_pooled"].backward.count(added) == 2 and passes["row_gather"].backward.count(added) == 1


def test_a_plan_has_room_for_the_rows_of_every_chunk() -> None:
    here = situation(1, 8, sub_keys=128, chunks=4)
    unique = here.layout("row_gather_unique", "fp32", "fp32")
    (planned,) = (one for one in Search(here).priced() if one.layout == unique)
    assert here.load.rows(1) < here.load.rows_by_chunk(1) / 2
    trace = trace_step(here.config, here.schema, here.rows, "cuda")
    alike, *_ = rank_storage(here.config, here.schema, unique, trace)  # what `exchange_storage` takes of each chunk
    assert planned.storage_W[0].activations == pytest.approx(alike.activations, rel=0.01)


CHUNKS = 4
HIDDEN = (CHUNKS - 1) / CHUNKS


def in_chunks(nodes: int = 1, **settings: object) -> Situation:
    return situation(nodes, 8, rows=8192, chunks=CHUNKS, **settings)


def phases_of(here: Situation, strategy: str, retrieval: float = 0.0) -> dict[str, Phase]:
    layout = here.layout(strategy, "fp32", "fp32")
    time = step_time(here, layout, replace(NOTHING_ELSE, memory=retrieval, retrieval=retrieval), 0.0)
    return {phase.name: phase for phase in time.phases}


def with_rates(here: Situation, factor: float, *names: str) -> Situation:
    """On a machine that is so many times as fast in these."""
    tree = json.loads(here.machine.model_dump_json())
    for name in names:
        tree[name]["points"] = [[size, factor * rate] for size, rate in tree[name]["points"]]
    return replace(here, machine=Machine.model_validate(tree))


def seconds_of(here: Situation, strategy: str, *names: str) -> float:
    """All messages of these names."""
    messages = expected_bytes(strategy, here.topology.world, 8, here.load, here.dim)
    chosen = [message for message in messages if message.name in names]
    assert len(chosen) == len(names)
    return here.memories * sum(message_seconds(message, here.machine, here.topology, CHUNKS) for message in chosen)


@pytest.mark.parametrize("strategy", ["row_pooled", "row_gather_unique", "column"])
def test_hits_travel_behind_the_retrieval_of_the_next_chunk(strategy: str) -> None:
    here = in_chunks()
    there = phases_of(here, strategy)["hits there"]
    for retrieval in (there.seconds / 100, 1.0):
        behind = phases_of(here, strategy, retrieval)["hits there"]
        assert behind.seconds == there.seconds
        assert behind.hidden == pytest.approx(min(HIDDEN * there.seconds, there.hidden + HIDDEN * retrieval))


def test_only_retrieval_in_the_forward_has_hits_behind_it() -> None:
    here = in_chunks()
    trace = trace_step(here.config, here.schema, here.rows, "cuda")
    model = ModelTime.of(trace, here.machine)
    forward = [op for op in trace.ops if op.region in ("retrieval", "gate") and not op.backward]
    gate = sum(operator_seconds(op, here.machine) for op in forward if op.region == "gate")
    assert gate > 0
    assert model.retrieval + gate == pytest.approx(sum(operator_seconds(op, here.machine) for op in forward))
    assert model.retrieval < model.memory


def test_what_finds_distinct_rows_in_the_update_hides_no_hits() -> None:
    here = in_chunks()
    slow = with_rates(here, 1e-3, "sort")
    hidden = [phases_of(one, "column")["hits there"].hidden for one in (here, slow)]
    assert hidden == [0, 0]
    hidden = [phases_of(one, "row_gather_unique")["hits there"].hidden for one in (here, slow)]
    assert hidden[1] == pytest.approx(HIDDEN * seconds_of(here, "row_gather_unique", "counts", "rows"))


def test_gradients_of_sums_travel_behind_those_of_weights_and_not_behind_the_update() -> None:
    """Whose rows wait for them all; gradients of weights travel behind it."""
    here = with_rates(in_chunks(), 1e-6, "hit_update", "row_update")
    found = phases_of(here, "row_pooled")
    weighed = exchange_work(here.layout("row_pooled", "fp32", "fp32"), here.load, here.dim).weighed
    weighing = here.memories * CHUNKS * here.machine.pass_seconds(weighed / CHUNKS)
    sums, weights = (seconds_of(here, "row_pooled", name) for name in ("pooled_gradient", "hits_gradient"))
    assert weighing < sums and weights < found["update"].seconds
    assert found["gradients"].hidden == pytest.approx(HIDDEN * (weighing + weights))
    assert found["gradients"].seconds == pytest.approx(sums + weights)


def test_gradients_of_rows_travel_behind_those_of_the_weights_at_home() -> None:
    here = with_rates(in_chunks(), 1e-6, "hit_update", "row_update")
    at_home = exchange_work(here.layout("row_gather", "fp32", "fp32"), here.load, here.dim).home
    found = phases_of(here, "row_gather")["gradients"]
    assert found.hidden == pytest.approx(HIDDEN * min(found.seconds, here.memories * at_home.backward(here.machine)))


def test_sums_across_groups_are_waited_for_at_once() -> None:
    here = with_rates(in_chunks(nodes=2), 1e-6, "hit_read", "hit_update")
    found = phases_of(here, "two_level")
    in_group = seconds_of(here, "two_level", "pooled_in_group")
    assert found["sums home"].hidden == pytest.approx(HIDDEN * in_group)
    assert found["sums home"].seconds > 1.5 * in_group


@pytest.mark.parametrize("strategy", ["row_pooled", "row_pooled_sparse", "row_gather", "row_gather_unique"])
@pytest.mark.parametrize("lookup", ["triton", "fbgemm"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_chunks_take_a_pass_for_the_weights_gradients_and_fbgemm_reads_again(
    strategy: str, lookup: str, dtype: str
) -> None:
    here, whole = (situation(1, 8, rows=8192, chunks=chunks, lookup=lookup) for chunks in (CHUNKS, 1))
    layout = here.layout(strategy, "fp32", dtype)
    parts, at_once = (exchange_work(layout, one.load, one.dim) for one in (here, whole))
    row = here.dim * {"fp32": 2 * 4, "fp16": 5 * 4 + 3 * 2}[dtype]
    weighed = 0 if "gather" in strategy else pytest.approx(parts.read * row)
    assert (parts.weighed, at_once.weighed) == (weighed, 0)
    assert (parts.read_again, at_once.read_again) == (lookup == "fbgemm", False)
    assert parts.rows == at_once.rows == at_once.rows_by_chunk < parts.rows_by_chunk


def test_an_update_takes_longer_by_what_chunks_cost_it() -> None:
    here, whole = in_chunks(), situation(1, 8, rows=8192)
    update, before = (phases_of(one, "row_pooled")["update"].seconds for one in (here, whole))
    work, machine = exchange_work(here.layout("row_pooled", "fp32", "fp32"), here.load, here.dim), here.machine
    put_together = passes_seconds([16 * work.read, 2 * 8 * here.load.bags * here.dim * 4], machine)
    weighing = CHUNKS * machine.pass_seconds(work.weighed / CHUNKS)
    assert update - before == pytest.approx(here.memories * (put_together + weighing))
