"""What is said where nothing fits: what is short, and changes that would fit."""

from __future__ import annotations

from dataclasses import replace

from test_planning import SCHEMA, SMALL, situation

from msn_dist.data.schema import History
from msn_dist.planner.plan_file import PlanFile
from msn_dist.planner.planning import Infeasible, plan


def test_what_does_not_fit_is_explained_with_changes_that_do() -> None:
    here = situation(1, 8, gib=40, sub_keys=65_536, value_dim=64)
    found = plan(here, rounding=False, date="2026-01-01")
    assert isinstance(found, Infeasible)
    lines = str(found).splitlines()
    assert "rank 0 lacks" in lines[0] and "GiB" in lines[0]
    changes = [line.split("iB  ")[-1].split()[0] for line in lines[2:]]
    assert {"memory.sub_keys=32768", "memory.value_dim=16", "data.batch_size=32768,"} <= set(changes)
    for change in ("sub_keys", "value_dim"):
        value = int(next(line for line in changes if change in line).split("=")[1])
        smaller = situation(1, 8, gib=40, **{"sub_keys": 65_536, "value_dim": 64, change: value})
        assert isinstance(plan(smaller, rounding=False, date="2026-01-01"), PlanFile)
        larger = situation(1, 8, gib=40, **{"sub_keys": 65_536, "value_dim": 64, change: 2 * value})
        assert isinstance(plan(larger, rounding=False, date="2026-01-01"), Infeasible), "a smaller change would do"


def test_where_no_single_change_would_do_several_at_once_are_told() -> None:
    """The batch alone is too much for the memory there is, and so are the slots."""
    here = situation(1, 1, gib=0.3, rows=65_536, sub_keys=16_384)
    found = plan(replace(here, schema=SMALL), rounding=False, date="2026-01-01")
    *_, several = str(found).splitlines()
    changes = dict(change.split("=") for change in several.split("iB  ")[1].split())
    assert list(changes) == ["memory.value_dtype", "memory.sub_keys", "data.batch_size"]
    memory = {"sub_keys": int(changes["memory.sub_keys"]), "value_dtype": changes["memory.value_dtype"]}
    smaller = situation(1, 1, gib=0.3, rows=int(changes["data.batch_size"]), **memory)
    assert isinstance(plan(replace(smaller, schema=SMALL), rounding=False, date="2026-01-01"), PlanFile)


def test_what_does_not_fit_by_a_named_look_up_is_told_nothing_that_it_cannot_do() -> None:
    found = plan(situation(1, 8, gib=40, sub_keys=65_536, lookup="fbgemm"), rounding=False, date="2026-01-01")
    assert isinstance(found, Infeasible)
    assert "memory.sub_keys=32768" in str(found) and "bf16" not in str(found)


def test_what_fbgemm_cannot_train_is_no_way_out() -> None:
    found = plan(situation(1, 2, rows=64, sub_keys=4096, gib=2, lookup="fbgemm"), rounding=False, date="2026-01-01")
    assert isinstance(found, Infeasible)
    assert "memory.sub_keys=2048" in str(found) and "bf16" not in str(found)


def test_more_nodes_are_spoken_of_where_there_may_be_some() -> None:
    here = situation(1, 2, rows=64, sub_keys=4096, gib=0.01)
    alone = replace(here, topology=here.topology.model_copy(update={"between_nodes": None}))
    for one, tried in ((here, True), (alone, False)):
        assert ("times the nodes" in str(plan(one, rounding=False, date="2026-01-01"))) == tried


def test_more_nodes_are_tried_up_to_where_a_table_has_too_few_rows() -> None:
    """Of 256 rows 64 ranks have some each and 512 have not: twice as many nodes fit, eight times as many cannot be."""
    here = situation(8, 8, rows=64, gib=0.9, sub_keys=16_384)
    model = here.config.model.model_copy(update={"attention": True})
    history = {"past": History(columns={"item_past": "item"}, max_length=5)}
    few = SCHEMA.model_copy(update={"tables": SCHEMA.tables | {"item": 256}, "histories": history})
    here = replace(here, schema=few, config=here.config.model_copy(update={"model": model}))
    found = plan(here, rounding=False, date="2026-01-01")
    assert isinstance(found, Infeasible)
    assert "nodes: 16 in the topology" in str(found)


def test_changes_that_are_told_have_none_of_the_others_in_them() -> None:
    here = situation(1, 8, gib=40, rows=4096, sub_keys=65_536, value_dim=256)
    alone = replace(here, topology=here.topology.model_copy(update={"between_nodes": None}))
    lines = str(plan(alone, rounding=False, date="2026-01-01")).splitlines()[2:]
    changes = [frozenset(line.split("iB  ")[-1].split()) for line in lines]
    assert len(changes) >= 3
    assert not any(one < other for one in changes for other in changes)
