"""`msn plan --tune`: which candidates there are, and which nothing else beats."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_planning import SMALL, situation

from msn_dist.data.schema import History
from msn_dist.errors import InputError
from msn_dist.planner import tuning
from msn_dist.planner.search import Search
from msn_dist.planner.situation import Situation
from msn_dist.planner.tuning import tune


def test_tuning_keeps_only_what_nothing_else_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"sub_keys": (1, 2), "top_k": (0.5, 1), "value_dim": (1,), "rows": (1, 2), "nodes": (1, 2)}
    monkeypatch.setattr(tuning, "_SCALES", few)
    found = tune(situation(1, 2, rows=32_768, sub_keys=128), most_seconds=None, rounding=True, say=lambda line: None)
    assert len(found) == 2  # of k, as more slots take no more time
    assert not any(one.beats(other) for one in found for other in found)
    waiting = tune(situation(1, 2, rows=64, sub_keys=128), most_seconds=None, rounding=True, say=lambda line: None)
    assert {one.situation.topology.nodes for one in waiting} == {1}, "all wait for the host: more nodes are no faster"
    sizes = [one.parameters for one in found]
    assert sizes == sorted(sizes, reverse=True)
    assert not tune(situation(1, 2, rows=64, sub_keys=128), most_seconds=1e-9, rounding=False, say=lambda line: None)


def test_tuning_leaves_out_sizes_that_a_named_back_end_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"sub_keys": (1,), "top_k": (1, 2), "value_dim": (1,), "rows": (1,), "nodes": (1,)}
    monkeypatch.setattr(tuning, "_SCALES", few)
    here = situation(1, 2, rows=64, sub_keys=256, top_k=128, retrieval="triton")
    found = tune(here, most_seconds=None, rounding=False, say=lambda line: None)
    assert [one.situation.memory.top_k for one in found] == [128]


@pytest.mark.parametrize(
    ("here", "sub_keys"),
    [
        (situation(1, 2, rows=64, gib=0.55), (2, 1)),  # the first has no room for id tables, nor without them
        (situation(8, 8, rows=64, sub_keys=2048, gib=0.46), (1, 2)),  # whole tables leave room for the first alone
    ],
)
def test_each_candidate_has_its_id_tables_in_room_of_its_own(
    here: Situation, sub_keys: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_SCALES", {name: (1,) for name in tuning._SCALES} | {"sub_keys": sub_keys})
    (found,) = tune(here, most_seconds=None, rounding=False, say=lambda line: None)
    alone = Search(found.situation).fastest()
    assert found.situation.memory.sub_keys == here.memory.sub_keys * sub_keys[1]
    assert found.priced.storage_W == alone.storage_W and alone.fullest < alone.capacity
    assert sum(storage.kinds["id_tables"] for storage in alone.storage_W) == 5_900_024 * 64


def test_tuning_leaves_out_what_training_would_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_SCALES", {name: (1,) for name in tuning._SCALES} | {"rows": (0.5, 1)})
    here = situation(1, 2, rows=4, sub_keys=64, lookup="fbgemm", chunks=4)
    (found,) = tune(here, most_seconds=None, rounding=True, say=lambda line: None)
    assert (found.situation.memory.value_dtype, found.situation.rows) == ("fp32", 4)


def test_where_no_candidate_is_possible_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_SCALES", {name: (1,) for name in tuning._SCALES})
    history = {"past": History(columns={"item_past": "item"}, max_length=5)}
    here = situation(8, 8, rows=64, sub_keys=64)
    model = here.config.model.model_copy(update={"attention": True})
    few = SMALL.model_copy(update={"histories": history})
    here = replace(here, schema=few, config=here.config.model_copy(update={"model": model}))
    with pytest.raises(InputError, match="24 rows leave a rank of 64"):
        tune(here, most_seconds=None, rounding=False, say=lambda line: None)
