"""The planner and values in the host's memory: bytes, misses of the cache, the choice and its reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_planning import situation

from msn_dist.errors import InputError
from msn_dist.memory.values import VALUE_DTYPES
from msn_dist.planner.cost import ARRIVING, LEAVING
from msn_dist.planner.explain import WIDTH, explain
from msn_dist.planner.host_tier import CacheStep, cache_bytes
from msn_dist.planner.id_placement import IdPlan
from msn_dist.planner.load import Load
from msn_dist.planner.machine import Machine
from msn_dist.planner.plan_file import PlanFile, load_plan, write_plan
from msn_dist.planner.planning import Infeasible, plan
from msn_dist.planner.search import Search
from msn_dist.planner.situation import Situation
from msn_dist.sharding.cache_size import WAYS, cache_sets
from msn_dist.sharding.cached_lookup import CachedLookup
from msn_dist.sharding.lookup import ValueOptimizer
from msn_dist.training.plan_card import plan_card
from msn_dist.units import binary

GIB = 2**30
LARGE = {"sub_keys": 32_768, "value_dim": 64}  # 2^30 slots: 256 GiB of values in fp32


def with_host(here: Situation, host_gib: float | None = 1000) -> Situation:
    return replace(here, topology=here.topology.model_copy(update={"host_gib": host_gib}))


def planned(here: Situation, rounding: bool = False) -> PlanFile | Infeasible:
    return plan(here, rounding=rounding, date="2026-01-01")


def printed(found: PlanFile) -> str:
    console = Console(width=WIDTH, highlight=False)
    with console.capture() as capture:
        console.print(explain(found))
    return capture.get()


@pytest.mark.parametrize(("value_dtype", "share"), [("fp32", 0.1), ("fp16", 0.003), ("fp32", 1.0)])
def test_the_cache_takes_what_fbgemm_makes_of_it(value_dtype: str, share: float) -> None:
    """Its buffers on the meta device; the state of the optimizer is on the GPU, the rows are not."""
    rows, dim, dtype = 5_000, 12, VALUE_DTYPES[value_dtype]
    made = CachedLookup(rows, dim, ValueOptimizer(), torch.device("meta"), dtype, share)
    buffers = dict(made._tbe.named_buffers())
    names = ("lxu_cache_weights", "lxu_cache_state", "lxu_state", "cache_index_table_map")
    assert sum(buffers[name].nbytes for name in names) == cache_bytes(rows, dim * dtype.itemsize, share)
    assert buffers["weights_uvm"].numel() == rows * dim
    assert (buffers["momentum1_dev"].numel(), buffers["momentum1_uvm"].numel()) == (rows, 0)
    assert (made.weight_RD.shape, made.weight_RD.dtype, made.state.moment_R.shape) == ((rows, dim), dtype, (rows,))
    large = {name: buffer.nbytes for name, buffer in buffers.items() if buffer.nbytes > 1_000}
    assert large.keys() <= {*names, "weights_uvm", "momentum1_dev"}


def test_values_in_host_memory_leave_the_device_their_cache_and_state() -> None:
    here = with_host(situation(1, 2, **LARGE | {"cache": 0.05}))
    of_tier = {one.layout.tier: one for one in Search(here).priced() if one.layout.strategy == "row_pooled"}
    device, host = (of_tier[tier].storage_W for tier in ("device", "host"))
    rows = 2**29  # of a rank
    for before, after in zip(device, host, strict=True):
        assert (before.values, before.cache, before.host.total) == (rows * 256, 0, 0)
        places = WAYS * cache_sets(rows, 0.05)
        assert after.values == 0 and after.cache == places * (256 + 16) + 4 * rows
        assert after.value_state == before.value_state == 4 * rows and after.usage == before.usage
        assert after.host.values == rows * 256
        saved = after.value_state + after.id_tables + after.id_state + after.dense_parameters + after.dense_state
        assert after.host.checkpoint == after.host.values + saved
        assert after.total == sum(after.kinds.values())


@pytest.mark.parametrize("world", [1, 4])
def test_of_rows_that_are_hit_alike_the_cached_share_is_found(world: int) -> None:
    load = Load.uniform(2**20, bags=1000, hits=16)
    for share in (0.02, 0.1, 0.5, 0.9):
        found = CacheStep.of(load, world, 16_000, share, weighted=True)
        assert found.missed / found.rows == pytest.approx(1 - share, abs=1e-3)


def test_misses_are_those_of_a_simulated_cache() -> None:
    """Least recently used by step, any row in any place, as FBGEMM's but for its sets of 32."""
    generator = torch.Generator().manual_seed(0)
    load = Load.zipf(32**2, bags=20, hits=4, exponent=1.1)
    p_S = load.read_B.repeat_interleave(load.slots_B)
    p_S = 1 - (1 - p_S) ** load.bags
    for places in (200, 500, 800):
        last_S, missed = torch.full((len(p_S),), -1), []
        for step in range(1_500):
            hit_S = torch.rand(len(p_S), generator=generator) < p_S
            threshold = last_S.sort(descending=True).values[places - 1]
            missed.append(int((hit_S & (last_S < threshold)).sum()))
            last_S[hit_S] = step
        assert load.missed_rows(1, places) == pytest.approx(sum(missed[500:]) / 1_000, rel=0.1)


def test_a_cache_with_room_for_all_that_is_ever_hit_misses_nothing() -> None:
    load = Load(2**20, (100,), 4, torch.tensor([4 / 500], dtype=torch.float64), torch.tensor([500]))
    assert load.missed_rows(2, 500) == 0
    assert load.missed_rows(2, 499) > 0


def link_seconds(here: Situation) -> float:
    (host,) = [one for one in Search(here).priced() if one.layout.tier == "host"]
    return sum(phase.seconds for phase in host.time.phases if phase.name in (ARRIVING, LEAVING))


def test_less_crosses_the_link_the_larger_the_cache_and_the_more_uneven_the_hits() -> None:
    by_cache = [link_seconds(with_host(situation(1, 1, cache=cache))) for cache in (0.01, 0.1, 0.5, 1.0)]
    assert by_cache == sorted(by_cache, reverse=True) and len(set(by_cache)) == 4
    assert by_cache[-1] == 0
    by_skew = [link_seconds(with_host(situation(1, 1, zipf=zipf))) for zipf in (None, 0.8, 1.1, 1.4)]
    assert by_skew == sorted(by_skew, reverse=True) and len(set(by_skew)) == 4


def test_rows_without_a_place_cross_the_link_with_every_hit() -> None:
    load = Load.uniform(2**20, bags=10_000, hits=32)
    roomy, full = (CacheStep.of(load, 1, 320_000, share, weighted=True) for share in (0.5, 0.001))
    assert roomy.arriving == roomy.leaving == roomy.missed
    over, hits = full.missed - full.places, 320_000 / full.rows
    assert full.arriving == pytest.approx(full.places + over * (2 * hits + 1)) and full.leaving == full.missed
    asked = replace(full, weighted=False)  # whose weights are at home
    assert asked.arriving == pytest.approx(full.places + over * (hits + 1))


@pytest.mark.parametrize("strategy", ["column", "replicated"])
@pytest.mark.parametrize("ranks", [1, 8])
def test_a_strategy_that_has_no_host_tier_keeps_no_plan_from_it(strategy: str, ranks: int) -> None:
    """What the config names does not bind a plan."""
    here = with_host(situation(1, ranks, rows=64, gib=20, sub_keys=16_384 * (1 + (ranks > 1)), strategy=strategy))
    assert here.least_table_bytes() < 20 * GIB
    found = planned(here)
    assert isinstance(found, PlanFile) and found.memory.tier == "host"


def test_the_host_tier_is_chosen_where_the_device_is_too_small_and_the_reason_says_so(tmp_path: Path) -> None:
    here = with_host(situation(1, 1, zipf=1.05, **LARGE))
    found = planned(here)
    assert (found.memory.tier, found.memory.value_dtype, found.memory.wire) == ("host", "fp32", "fp32")
    device = next(rival for rival in found.rivals if rival.memory.tier == "device" and not rival.rounds)
    lacking = (device.bytes - found.capacity) / GIB
    assert found.reason == f"with values on the device it lacks {lacking:.1f} GiB" and device.why in found.reason
    assert sum(found.host_storage["values"]) == 2**30 * 256 and found.storage["values"] == [0]
    assert found.host_capacity == 1000 * GIB
    write_plan(found, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == found
    config = found.applied_to(here.config, here.schema)
    assert (config.memory.tier, here.config.memory.tier) == ("host", "device")
    text = printed(found)
    assert max(map(len, text.splitlines())) <= WIDTH
    for words in ("values fp32 in host memory, 0.1 cached", "rows from the host", "host: may fill", "device tier"):
        assert words in text
    card = plan_card(found, {})
    assert "values fp32 in host memory" in card.story
    first, *others = [row[1] for row in card.grids[1].rows]
    assert first == "fp32 in host memory" and "fp32" in others


def test_id_tables_that_only_the_host_tier_leaves_room_for_are_placed() -> None:
    """The device layout fits without them: that there is room for it must not turn a plan into none."""
    here = situation(1, 8, **LARGE)
    alone = min(priced.fullest for priced in Search(here, ids=IdPlan([], 0.0)).priced()) / GIB
    for gib in (alone - 0.01, alone + 0.01):
        found = planned(with_host(situation(1, 8, gib=gib, **LARGE)))
        assert found.memory.tier == "host"
        assert set(found.id_tables["features.id_tables"]) == {"user", "item", "hour"}


def test_where_rounding_is_allowed_16_bits_on_the_device_come_before_the_host_tier() -> None:
    """Though a step takes as long, by the host."""
    here = with_host(situation(1, 1, sub_keys=32_768, value_dim=32), host_gib=1500)
    tiers = []
    for rounding in (False, True):
        found = plan(here, rounding=rounding, date="2026-01-01")
        tiers.append((found.memory.tier, found.memory.value_dtype))
        narrower = [one for one in found.rivals if one.rounds and one.memory.tier == "device"]
        assert rounding or ("with values on the device it lacks" in found.reason and narrower)
    assert tiers == [("host", "fp32"), ("device", "bf16")]


def test_where_the_device_has_room_it_wins_and_the_host_tier_is_told_of() -> None:
    found = planned(with_host(situation(1, 1, rows=8192)))
    assert found.memory.tier == "device" and not found.host_storage
    (host,) = [rival for rival in found.rivals if rival.memory.tier == "host"]
    assert host.seconds > found.seconds and host.bytes < max(found.bytes_W)
    why = host.why.replace(", not", " ms, not")
    assert found.reason == f"one rank holds all, so all strategies are the same; it fits; host tier: {why}"
    assert host.why.startswith("+") and ARRIVING in host.why


def test_on_several_ranks_the_best_of_the_other_tier_is_a_rival() -> None:
    here = with_host(situation(1, 8, **LARGE), host_gib=250)
    found = planned(here)
    assert found.memory.tier == "device"
    assert len([rival for rival in found.rivals if rival.memory.tier == "host"]) == 1
    less = replace(here, topology=here.topology.model_copy(update={"device_gib": 20}))
    found = planned(less)
    exact = [one for one in Search(less).priced() if one.layout.wire == "fp32" and one.layout.value_dtype == "fp32"]
    fitting = sorted((one for one in exact if not one.short), key=lambda one: one.time.seconds)
    assert {one.layout.tier for one in fitting} == {"host"}
    assert (found.memory.strategy, found.memory.tier) == (fitting[0].layout.strategy, "host")
    assert found.reason.startswith("with values on the device it lacks ")
    assert f"; the next best is {fitting[1].layout.strategy}: " in found.reason
    assert not found.seconds_over_ranks.keys() & {"column", "replicated"}


def test_without_host_gib_and_on_a_cpu_all_lies_on_the_device() -> None:
    for here in (situation(1, 1, **LARGE), on_a_cpu(with_host(situation(1, 1)))):
        assert {layout.tier for layout in Search(here).layouts} == {"device"}


def on_a_cpu(here: Situation) -> Situation:
    return replace(here, machine=Machine.model_validate(here.machine.model_dump() | {"kind": "cpu"}))


@pytest.mark.parametrize(
    "settings", [{"lookup": "triton"}, {"lookup": "reference"}, {"value_dtype": "bf16"}, {"chunks": 2}]
)
def test_what_training_would_refuse_is_not_planned(settings: dict) -> None:
    here = with_host(situation(1, 2, **settings))
    assert {layout.tier for layout in Search(here).layouts} == {"device"}


def test_no_layout_in_host_memory_is_of_a_strategy_or_of_values_that_it_cannot_have() -> None:
    in_host = {layout for layout in Search(with_host(situation(2, 4))).layouts if layout.tier == "host"}
    assert {layout.value_dtype for layout in in_host} == {"fp32"} and {one.lookup for one in in_host} == {"fbgemm"}
    assert {one.strategy for one in in_host} == {
        "row_pooled", "row_pooled_sparse", "row_gather", "row_gather_unique", "two_level",
    }  # fmt: skip


def lines_of(found: PlanFile | Infeasible) -> list[str]:
    assert isinstance(found, Infeasible)
    return str(found).splitlines()


def test_the_host_tier_is_offered_where_the_topology_or_the_config_left_it_out() -> None:
    first, _, *changes = lines_of(planned(situation(1, 1, **LARGE)))
    assert "host" not in first
    (offered,) = [line for line in changes if "tier" in line]
    sizes, change = offered.strip().split("  ", 1)
    assert change == "memory.tier=host, host_gib in the topology"
    chosen = planned(with_host(situation(1, 1, **LARGE), host_gib=1e4))
    on_host = sum(sum(bytes_W) for bytes_W in chosen.host_storage.values())
    assert sizes == f"{binary(max(chosen.bytes_W))}, host {binary(on_host)}"
    settings = {"value_dtype": "bf16", "lookup": "triton", "chunks": 2}
    _, _, *changes = lines_of(planned(with_host(situation(1, 1, **LARGE | {"value_dim": 128} | settings))))
    offer = "  memory.tier=host memory.lookup=auto memory.value_dtype=fp16 memory.chunks=1"
    assert any(line.endswith(offer) for line in changes)


def test_it_is_said_when_host_memory_is_what_is_short() -> None:
    first, _, *changes = lines_of(planned(with_host(situation(1, 1, **LARGE), host_gib=300)))
    before, _, after = first.partition(" In the host tier rank 0 lacks ")
    assert "rank 0 lacks" in before and "may fill 136 GiB" in before
    assert after.startswith("216.4 GiB") and " of host memory with row_pooled" in after and "may fill 300 GiB" in after
    assert not any("memory.tier" in line for line in changes)
    (narrower,) = [line for line in changes if "memory.value_dim" in line]
    assert "memory.value_dim=32" in narrower and ", host " in narrower
    first, *_ = lines_of(planned(with_host(situation(1, 1, gib=10, **LARGE), host_gib=2000)))
    assert " In the host tier rank 0 lacks " in first and "may fill 10 GiB" in first and "of host memory" not in first


@pytest.mark.parametrize("host_gib", [0, -1, float("inf")])
def test_host_memory_is_a_positive_number(host_gib: float) -> None:
    here = situation(1, 1)
    with pytest.raises(ValueError, match="host_gib"):
        type(here.topology)(**here.topology.model_dump() | {"host_gib": host_gib})


def test_a_plan_for_the_host_tier_is_refused_where_the_config_has_changed() -> None:
    here = with_host(situation(1, 1, **LARGE))
    found = planned(here)
    smaller = here.config.memory.model_copy(update={"cache": 0.01})
    with pytest.raises(InputError, match="memory.cache=0.1, and this run has 0.01"):
        found.applied_to(here.config.model_copy(update={"memory": smaller}), here.schema)
