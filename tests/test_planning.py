"""`msn plan` and what is behind it: the choice, its reasons, what does not fit, and bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from msn_dist.config import (
    DataConfig,
    IdOptimizerConfig,
    MemoryConfig,
    OptimizerConfig,
    RankMixerConfig,
    RunConfig,
    Strategy,
    TrainingConfig,
    ValueOptimizerConfig,
)
from msn_dist.data.schema import History, Schema
from msn_dist.errors import InputError
from msn_dist.planner.id_placement import place_ids
from msn_dist.planner.id_tables import NoRoom
from msn_dist.planner.machine import Latency, Machine, load_machine
from msn_dist.planner.plan_file import PlanFile, load_plan, write_plan
from msn_dist.planner.planning import Infeasible, plan
from msn_dist.planner.search import Search
from msn_dist.planner.situation import Popularity, Situation
from msn_dist.planner.topology import Link, Topology

ROOT = Path(__file__).parent.parent
TOPOLOGIES = sorted((ROOT / "configs" / "topology").glob("h200*.yaml"))
SCHEMA = Schema(
    name="ids",
    tables={"user": 5_000_000, "item": 900_000, "hour": 24},
    ids={"user": "user", "item": "item", "hour": "hour"},
    labels=["click"],
    group="user",
)
SMALL = SCHEMA.model_copy(update={"tables": dict.fromkeys(SCHEMA.tables, 24)})
BETWEEN = Link(bandwidth_gb_s=40, latency_us=30)


def situation(nodes: int, ranks_per_node: int, rows: int = 1024, zipf: float | None = None, gib: float = 136, **memory):
    """On H200s, `rows` a rank."""
    topology = Topology(
        name="here", machine="h200", nodes=nodes, ranks_per_node=ranks_per_node, device_gib=gib, between_nodes=BETWEEN
    )
    config = RunConfig(
        name="planned",
        data=DataConfig(path="data", batch_size=rows * topology.world),
        model=RankMixerConfig(tokens=8, width=64, layers=2),
        memory=MemoryConfig(**{"sub_keys": 1024, "top_k": 32, "key_dim": 64} | memory),
        training=TrainingConfig(precision="bf16"),
    )
    return Situation(config, SCHEMA, topology, load_machine("h200"), Popularity(zipf))


def with_optimizer(here: Situation, kind: str, **memory: object) -> Situation:
    """Of the values."""
    optimizer = OptimizerConfig(values=ValueOptimizerConfig(kind=kind))
    changes = {"optimizer": optimizer, "memory": here.config.memory.model_copy(update=memory)}
    return here.with_config(here.config.model_copy(update=changes))


# what must win, and why it does: the crossovers of docs/exchange.md
SCENARIOS = {
    "few slots": (situation(1, 8, rows=32_768, sub_keys=64, top_k=32), "replicated"),
    "one node": (situation(1, 8), "row_pooled"),
    "eight nodes": (situation(8, 8, zipf=1.05), "row_gather_unique"),
    "32 nodes": (situation(32, 8, sub_keys=65_536), "row_pooled_sparse"),
    "64 nodes": (situation(64, 8, sub_keys=65_536), "row_pooled_sparse"),
    "256 nodes": (situation(256, 8, sub_keys=65_536), "row_gather"),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_plan_is_the_fastest_of_what_fits_and_says_by_how_much(name: str) -> None:
    here, expected = SCENARIOS[name]
    found = plan(here, rounding=False, date="2026-01-01")
    priced = [one for one in Search(here).priced() if not one.short and one.layout.wire == "fp32"]
    exact = [one for one in priced if one.layout.value_dtype == "fp32"]
    alike = 1.02 * min(one.time.seconds for one in exact)  # where hosts are slower than all devices, these decide
    exact.sort(key=lambda one: (max(one.time.seconds, alike), one.time.device))
    assert found.memory.strategy == exact[0].layout.strategy == expected
    assert found.seconds == pytest.approx(exact[0].time.seconds)
    share = exact[1].time.seconds / exact[0].time.seconds - 1
    percent = f"{share:+.1%}" if share < 0.1 else f"{share:+.0%}"
    same = exact[1].time.seconds <= alike and found.seconds > exact[0].time.device
    assert f"the next best is {exact[1].layout.strategy}: {'as fast' if same else percent}" in found.reason


def test_rounding_is_chosen_only_if_it_is_allowed() -> None:
    here = situation(8, 8, rows=8192)
    exact, rounded = (plan(here, rounding=allowed, date="2026-01-01") for allowed in (False, True))
    assert (exact.memory.wire, exact.memory.value_dtype) == ("fp32", "fp32")
    assert rounded.seconds < exact.seconds and rounded.memory.wire != "fp32"
    assert any(rival.rounds and rival.seconds < exact.seconds for rival in exact.rivals)


@pytest.mark.parametrize("rows", [64, 1024])
def test_what_fits_only_with_rounding_is_planned_where_that_is_allowed(rows: int) -> None:
    """Though it is no faster: the host is slower than the device."""
    here = situation(1, 8, gib=80, sub_keys=32_768, value_dim=256, rows=rows)
    assert isinstance(plan(here, rounding=False, date="2026-01-01"), Infeasible)
    found = plan(here, rounding=True, date="2026-01-01")
    assert found.memory.value_dtype == "bf16" and max(found.bytes_W) <= found.capacity
    assert set(found.id_tables["features.id_tables"]) == {"user", "item", "hour"}


def test_what_is_short_is_told_of_layouts_that_may_be_chosen() -> None:
    """In 16 bits all would fit but id tables, of which none is spoken where that is not allowed."""
    here = situation(1, 8, gib=80, sub_keys=32_768, value_dim=256)
    here = replace(here, schema=SCHEMA.model_copy(update={"tables": SCHEMA.tables | {"user": 2_000_000_000}}))
    exact, rounded = (str(plan(here, rounding=allowed, date="2026-01-01")) for allowed in (False, True))
    assert "rank 0 lacks" in exact and "(values 128 GiB" in exact and "id tables not counted" in exact
    assert "Beside all else, id tables: rank " in rounded and "mostly for features.id_tables.user" in rounded


@pytest.mark.parametrize(("nodes", "ranks_per_node", "rounding"), [(1, 6, False), (3, 8, False), (8, 8, True)])
def test_the_curves_over_ranks_have_the_planned_ones(nodes: int, ranks_per_node: int, rounding: bool) -> None:
    found = plan(
        situation(nodes, ranks_per_node, rows=8192 if rounding else 1024), rounding=rounding, date="2026-01-01"
    )
    assert (found.memory.wire != "fp32") == rounding
    of_ranks = dict(found.seconds_over_ranks[found.memory.strategy])
    assert of_ranks[nodes * ranks_per_node] == pytest.approx(found.seconds, rel=1e-12)  # a sum of phases rounds


def test_embeddings_of_histories_are_looked_up_for_a_ranks_share_of_all_events() -> None:
    """Their tables are cut by rows: more ranks bring more events and more owners."""
    history = {"past": History(columns={"item_past": "item"}, max_length=50)}
    schema = SCHEMA.model_copy(update={"histories": history})
    held = []
    for nodes in (1, 8, 64):
        here = situation(nodes, 8, strategy="row_gather_unique")
        model = here.config.model.model_copy(update={"attention": True})
        here = replace(here, schema=schema, config=here.config.model_copy(update={"model": model}))
        held.append(next(p for p in Search(here).priced() if p.layout.strategy == "row_gather_unique").storage_W[0])
    assert held[2].activations < 1.2 * held[0].activations


def test_keys_that_share_a_table_have_their_sums_each() -> None:
    here = situation(64, 8, rows=64, sub_keys=1024, top_k=4)
    ids = {**SCHEMA.ids, "last_item": "item", "next_item": "item"}
    shared = replace(here, schema=SCHEMA.model_copy(update={"ids": ids}))
    one, three = (max(storage.activations for storage in Search(at).priced()[0].storage_W) for at in (here, shared))
    sums = 4 * 512 * 64 * here.config.model.embedding_dim
    assert three - one >= 2 * 2 * sums  # of two keys, on both sides of the all-to-all


def test_a_plan_is_written_and_read_as_it_is(tmp_path: Path) -> None:
    found = plan(situation(2, 4), rounding=False, date="2026-01-01")
    write_plan(found, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == found
    assert len(found.bytes_W) == 8
    assert set(found.id_tables["features.id_tables"]) == {"user", "item", "hour"}


def test_a_search_that_leaves_the_kernels_is_told() -> None:
    sizes = {"kernels": 1024, "torch": 2**17}
    said = {by: plan(situation(64, 8, sub_keys=n), rounding=True, date="2026-01-01").demand for by, n in sizes.items()}
    assert "not fused: the kernels take" in said["torch"] and "fused" not in said["kernels"]


def test_a_step_of_more_bytes_than_can_be_counted_is_refused() -> None:
    with pytest.raises(InputError, match="a step of 536,870,912 rows a rank .data.batch_size=1073741824. needs"):
        plan(situation(1, 2, rows=2**29), rounding=False, date="2026-01-01")


def test_no_plan_leaves_id_tables_out_where_only_some_layouts_fit() -> None:
    """row_pooled needs more for a step than the ranks have, and others do not."""
    totals = {one.layout.strategy: one.fullest for one in Search(situation(64, 8, sub_keys=16_384)).priced()}
    between = (totals["row_pooled"] + totals["row_gather"]) / 2
    assert totals["row_gather"] < between
    found = plan(situation(64, 8, sub_keys=16_384, gib=between / 2**30), rounding=False, date="2026-01-01")
    assert set(found.id_tables["features.id_tables"]) == {"user", "item", "hour"}


@pytest.mark.parametrize(
    ("memory", "training", "message"),
    [
        ({}, {"device": "cpu"}, "training.device=cpu, and the topology's ranks are cuda"),
        (
            {"lookup": "fbgemm", "value_dtype": "bf16"},
            {},
            "memory.lookup=fbgemm: FBGEMM stores no values of bf16; set ",
        ),
        (
            {"lookup": "triton", "value_dim": 8192},
            {},
            "memory.lookup=triton: the kernels take values up to 4096 wide, ",
        ),
        (
            {"retrieval": "triton", "top_k": 256},
            {},
            "memory.retrieval=triton: the kernels take top_k up to 128, and it ",
        ),
        ({"retrieval": "triton", "key_dim": 512}, {}, "memory.retrieval=triton: the kernels take key_dim up to 256, "),
        ({"chunks": 5000}, {}, "memory.chunks=5000 is more than the 1024 rows of a rank"),
    ],
)
def test_what_training_would_refuse_is_not_planned(memory: dict, training: dict, message: str) -> None:
    here = situation(1, 8)
    config = here.config.model_copy(
        update={
            "memory": here.config.memory.model_copy(update=memory),
            "training": here.config.training.model_copy(update=training),
        }
    )
    with pytest.raises(InputError, match=message):
        here.with_config(config)


def test_the_values_optimizer_is_priced_with_its_state() -> None:
    here = situation(1, 8)
    planned = {
        kind: plan(with_optimizer(here, kind), rounding=False, date="2026-01-01")
        for kind in ("sgd", "rowwise_adagrad", "rowwise_adam")
    }
    rows = here.memories * here.slots // 8
    assert [found.storage["value state"][0] for found in planned.values()] == [0, rows * 4, rows * (4 + 4 * here.dim)]
    assert with_optimizer(here, "rowwise_adam").least_table_bytes() == rows * (4 * here.dim + 4 + 4 * here.dim)
    sgd, adagrad, adam = (
        next(phase.seconds for phase in found.phases if phase.name == "update") for found in planned.values()
    )
    assert sgd == adagrad < adam
    with pytest.raises(InputError, match="optimizer.values.kind='sgd', and this run has 'rowwise_adagrad'; plan"):
        planned["sgd"].applied_to(here.config, here.schema)


def test_on_a_cpu_row_wise_adam_is_planned_with_the_look_up_that_has_it() -> None:
    here = situation(1, 8)
    tree = json.loads(here.machine.model_dump_json()) | {"kind": "cpu", "ranks": 8}
    there = Situation(here.config, SCHEMA, here.topology, Machine.model_validate(tree))
    adam = with_optimizer(there, "rowwise_adam")
    assert [one.layout("row_pooled", "fp32", "fp32").lookup for one in (there, adam)] == ["fbgemm", "reference"]
    with pytest.raises(InputError, match="memory.lookup=fbgemm: on a CPU FBGEMM has no rowwise_adam"):
        with_optimizer(there, "rowwise_adam", lookup="fbgemm")


def test_on_one_rank_every_strategy_is_planned_as_the_same() -> None:
    """With the look-up that training has there: `auto` holds for column and replicated too."""
    searches = [Search(situation(1, 1, sub_keys=64, strategy=strategy)) for strategy in get_args(Strategy)]
    priced = [next(one for one in search.priced() if search.exact(one.layout)) for search in searches]
    assert {one.layout.lookup for one in priced} == {"triton"}
    assert len({one.time.device for one in priced}) == len({one.fullest for one in priced}) == 1
    curves = searches[0].seconds_over_ranks(priced[0].layout, searches[0].ids)
    assert len({tuple(curve[0]) for curve in curves.values()}) == 1


def test_rows_too_wide_for_the_kernels_are_planned_with_the_look_up_that_training_takes() -> None:
    here = situation(1, 2, sub_keys=64, value_dim=8192)
    assert [here.layout("row_pooled", "fp32", dtype).lookup for dtype in ("fp32", "bf16")] == ["fbgemm", "reference"]


def test_a_look_up_that_is_named_rules_out_strategies_that_it_cannot_serve() -> None:
    by_triton, by_fbgemm = (
        {layout.strategy for layout in Search(situation(1, 8, sub_keys=64, lookup=lookup)).layouts}
        for lookup in ("triton", "fbgemm")
    )
    assert by_fbgemm and by_triton - by_fbgemm == {"column", "replicated"}


def test_id_tables_that_fit_nowhere_are_named() -> None:
    here = situation(1, 2, gib=1, sub_keys=64)
    schema = SCHEMA.model_copy(update={"tables": SCHEMA.tables | {"user": 200_000_000}})
    there = Situation(here.config, schema, here.topology, here.machine)
    with pytest.raises(NoRoom, match="user"):
        Search(there)
    assert "user" in str(plan(there, rounding=False, date="2026-01-01"))


def test_histories_are_priced_by_their_mean_length_and_full_where_it_is_not_known() -> None:
    def seconds(max_length: int, **mean_lengths: float) -> float:
        history = History(max_length=max_length, columns={"seen": "item"})
        schema = SCHEMA.model_copy(update={"histories": {"past": history}})
        return place_ids(replace(situation(1, 8), schema=schema, mean_lengths=mean_lengths), 0).seconds

    assert seconds(50) > seconds(5)
    assert seconds(50, seen=5.0) == seconds(5)


def test_lists_of_ids_are_held_by_their_mean_length() -> None:
    here = situation(1, 8)
    lists = replace(here, mean_lengths={"item": 50.0})
    one, several = (Search(at).priced()[0].storage_W[0] for at in (here, lists))
    more = 49 * here.rows * 8
    assert several.batch - one.batch == 2 * more  # the next batch is there as well
    assert several.activations - one.activations >= more  # ids that TorchRec keeps


def test_id_tables_are_priced_with_their_decay_and_what_a_module_takes_besides_its_collectives() -> None:
    here = situation(1, 8)
    ids = place_ids(here, 0)
    decay = here.config.optimizer.model_copy(update={"ids": IdOptimizerConfig(decay=1e-4)})
    decaying = place_ids(here.with_config(here.config.model_copy(update={"optimizer": decay})), 0)
    held = max(sum(4 * table.dim * table.rows_per_rank[rank] for table in ids.tables) for rank in range(8))
    assert decaying.seconds - ids.seconds == pytest.approx(here.machine.pass_seconds(2 * held) / 8, rel=1e-6)
    step = Latency(seconds=5e-3, source="measured")
    measured = place_ids(replace(here, machine=here.machine.model_copy(update={"id_step": step})), 0)
    collectives = 4 * here.machine.all_to_all.latency
    assert measured.seconds - ids.seconds == pytest.approx(5e-3 - collectives, rel=1e-6)


def test_a_memory_is_not_planned_for_gpus_that_the_kernels_do_not_run_on() -> None:
    here = situation(1, 1)
    with pytest.raises(InputError, match="has no rates of this project's kernels"):
        replace(here, machine=here.machine.model_copy(update={"retrieve": None}))


def test_more_popular_slots_make_asking_for_rows_once_cheaper() -> None:
    even, skewed = (Search(situation(8, 8, zipf=zipf)) for zipf in (None, 1.2))
    of_unique = [
        next(one.time.device for one in search.priced() if one.layout.strategy == "row_gather_unique")
        for search in (even, skewed)
    ]
    assert of_unique[1] < of_unique[0]


def test_what_a_plan_decides_otherwise_than_the_config_is_told() -> None:
    here = situation(1, 2, sub_keys=64)
    found = plan(here, rounding=False, date="2026-01-01")
    assert found.overruled(found.applied_to(here.config, here.schema)) == ""
    other = here.config.memory.model_copy(update={"strategy": "column", "wire": "int8"})
    config = here.config.model_copy(update={"memory": other})
    assert found.overruled(config) == f"memory.strategy={found.memory.strategy} for column, memory.wire=fp32 for int8"


def test_a_plan_is_refused_for_other_data() -> None:
    here = situation(1, 2, sub_keys=64)
    found = PlanFile.model_validate_json(plan(here, rounding=False, date="2026-01-01").model_dump_json())
    assert found.applied_to(here.config, SCHEMA.model_copy(update={"name": "a newer day"})).memory is not None
    more_users = SCHEMA.model_copy(update={"tables": SCHEMA.tables | {"user": 6_000_000}})
    with pytest.raises(InputError, match="data.tables.user=5000000, and this run has 6000000; plan again"):
        found.applied_to(here.config, more_users)
    longer = SCHEMA.model_copy(update={"histories": {"past": History(columns={"past": "item"})}})
    with pytest.raises(InputError, match="data.histories={}, and this run has {'past'"):
        found.applied_to(here.config, longer)


def test_a_batch_smaller_than_the_world_is_refused() -> None:
    here = situation(1, 8)
    config = here.config.model_copy(update={"data": DataConfig(path="data", batch_size=5)})
    with pytest.raises(InputError, match="batch_size=5"):
        Situation(config, SCHEMA, here.topology, here.machine)


def test_a_plan_is_refused_for_another_config_or_other_ranks(tmp_path: Path) -> None:
    here = situation(1, 2, sub_keys=64)
    found = plan(here, rounding=False, date="2026-01-01")
    assert found.applied_to(here.config, here.schema).memory.strategy == found.memory.strategy
    other = here.config.model_copy(update={"memory": here.config.memory.model_copy(update={"top_k": 16})})
    with pytest.raises(InputError, match="memory.top_k=32, and this run has 16"):
        found.applied_to(other, here.schema)
    with pytest.raises(InputError, match="2 ranks .1 node of 2., and this run has 4 ranks .2 nodes of 2."):
        found.require_ranks(4, 2)
    with pytest.raises(InputError, match="counts with NVIDIA H200, and this rank runs on a toaster"):
        found.require_machine("a toaster")
    (tmp_path / "no.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        load_plan(tmp_path / "no.json")
    (tmp_path / "other.json").write_text('{"world_size": 2, "tables": []}')
    with pytest.raises(InputError, match="is no plan of `msn plan`"):
        load_plan(tmp_path / "other.json")


def test_the_curve_of_a_strategy_ends_where_ranks_would_be_without_rows() -> None:
    found = plan(situation(2, 8, sub_keys=4, top_k=4), rounding=False, date="2026-01-01")
    assert max(ranks for ranks, _ in found.seconds_over_ranks["column"]) == 16


@pytest.mark.parametrize("ranks", [1, 8])
def test_ids_of_histories_that_are_only_added_up_are_held_too(ranks: int) -> None:
    """Eight bytes each, until the next step, and once more for the backward where they travel."""
    held = []
    for length in (1, 1001):
        history = {"past": History(columns={"item_past": "item"}, max_length=length)}
        here = replace(situation(1, ranks), schema=SCHEMA.model_copy(update={"histories": history}))
        held.append(Search(here).priced()[0].storage_W[0].activations)
    assert held[1] - held[0] >= 8 * 1024 * 1000 * (1 + (ranks > 1))


def test_more_memory_never_makes_a_step_longer() -> None:
    """Id tables lie beside what is chosen, and not beside what needs least."""
    times, strategies = [], []
    for gib in (0.45, 0.55, 0.7, 0.8, 1.0, 1.2, 1.4, 2.0):
        found = Search(situation(8, 8, rows=2048, sub_keys=4096, gib=gib)).fastest()
        times.append((found.time.seconds, found.time.device))
        strategies.append(found.layout.strategy)
        assert found.fullest <= gib * 2**30
    alike = 1.02 * min(seconds for seconds, _ in times)  # here the host is what is waited for
    order = [(max(seconds, alike), device) for seconds, device in times]
    assert order == sorted(order, reverse=True) and len(set(order)) > 3
    assert strategies == ["row_pooled_sparse"] * 5 + ["two_level"] * 3
