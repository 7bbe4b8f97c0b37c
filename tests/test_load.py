"""What is expected of a load, against bags drawn at random and against closed forms.

Shape suffixes: M bags, L hits a bag, n slots, W owners, WW from a rank (first) to an owner (second).
"""

from __future__ import annotations

import json
import math

import pytest
import torch

from drawn_bags import drawn_bags
from msn_dist.errors import InputError
from msn_dist.memory.health import SlotUsage
from msn_dist.memory.placement import Placement
from msn_dist.planner.load import CountedLoad, Load, expected_bytes, zipf
from msn_dist.planner.traffic import Demand
from msn_dist.training.summary import memory_usage

SUB_KEYS, SLOTS, BAGS, HITS = 256, 2**16, 64, 32


def test_uniform_loads_have_their_closed_forms() -> None:
    load = Load.uniform(SLOTS, BAGS, HITS)
    assert load.rows(8) == pytest.approx(SLOTS * (1 - (1 - HITS / SLOTS) ** (8 * BAGS)))
    assert load.owners_of_bag(64) == pytest.approx(64 * (1 - (63 / 64) ** HITS), rel=2e-4)
    assert load.owners_of_bag(1) == 1
    assert Load.uniform(8, BAGS, 6).owners_of_bag(2) == 2 and Load.uniform(8, BAGS, 6).owners_of_bag(8) == 6
    assert load.hottest_share == pytest.approx(1 / SLOTS)
    assert load.owner_load(1) == 1
    # nothing but chance makes an owner's load uneven: the largest of 64 normal numbers has a mean of 2.38
    assert load.owner_load(64) == pytest.approx(1 + 2.38 / math.sqrt(BAGS * HITS), rel=0.005)


@pytest.mark.parametrize("exponent", [1.05, 1.2])
def test_zipf_loads_are_those_of_drawn_bags(exponent: float) -> None:
    load = Load.zipf(SLOTS, BAGS, HITS, exponent)
    assert float((load.read_B * load.slots_B).sum()) == pytest.approx(HITS) and int(load.slots_B.sum()) == SLOTS
    slots_ML = drawn_bags(SUB_KEYS, 4096, HITS, exponent, seed=1)
    hits_n = torch.bincount(slots_ML.flatten(), minlength=SLOTS)
    assert load.hottest_share * HITS == pytest.approx(float(hits_n.max()) / 4096, rel=0.03)
    counted = CountedLoad.of(SLOTS, slots_ML, BAGS)
    for ranks in (1, 8, 64):
        assert load.rows(ranks) == pytest.approx(counted.rows(ranks), rel=0.01)
    for world in (8, 64):
        assert load.owners_of_bag(world) == pytest.approx(counted.owners_of_bag(world), rel=0.015)


def test_bins_lose_nothing_against_every_slot_for_itself() -> None:
    load = Load.zipf(2**20, BAGS, HITS, 1.05)
    share_n = (zipf(1024, 1.05)[:, None] * zipf(1024, 1.05)).flatten()
    time = -math.log1p(-float(load.read_B[0])) / float(share_n[0])
    assert float(-torch.expm1(-share_n * time).sum()) == pytest.approx(HITS, rel=1e-4)
    for ranks in (1, 512):
        rows = float(-torch.expm1(-share_n * time * ranks * BAGS).sum())
        assert load.rows(ranks) == pytest.approx(rows, rel=1e-3)


@pytest.mark.parametrize(("world", "tolerance"), [(8, 0.05), (64, 0.1)])
def test_the_busiest_owner_is_that_of_drawn_bags(world: int, tolerance: float) -> None:
    placement, loads, once = Placement.permuted(SLOTS), [], []
    for seed in range(8):
        demand = Demand.of(drawn_bags(SUB_KEYS, world * BAGS, HITS, 1.05, seed).split(BAGS), placement)
        for found, asked_WW in ((loads, demand.hits_WW), (once, demand.distinct_WW)):
            asked_W = asked_WW.sum(0).double()
            found.append(float(asked_W.max() / asked_W.mean()))
    load = Load.zipf(SLOTS, BAGS, HITS, 1.05)
    assert load.owner_load(world) == pytest.approx(sum(loads) / 8, rel=tolerance)
    assert load.owner_load(world, once=True) == pytest.approx(sum(once) / 8, rel=0.12)


def test_asking_once_a_chunk_is_asking_for_every_hit_where_every_bag_is_a_chunk() -> None:
    load = Load.zipf(SLOTS, BAGS, HITS, 1.05)
    alone, parts = load.in_chunks((1,) * BAGS), load.in_chunks((22, 21, 21))
    assert alone.rows_by_chunk(1) == pytest.approx(BAGS * HITS)
    assert alone.owner_load(8, once=True) == pytest.approx(load.owner_load(8))
    assert load.rows(1) == load.rows_by_chunk(1) == alone.rows(1)
    assert load.rows(1) < parts.rows_by_chunk(1) < BAGS * HITS
    assert load.owner_load(8, once=True) < parts.owner_load(8, once=True) < load.owner_load(8)


@pytest.mark.parametrize("power", range(20, 37, 4))
def test_large_tables_and_worlds_are_within_their_bounds(power: int) -> None:
    slots, worlds = 2**power, (8, 64, 512, 4096)
    flat, skewed = Load.uniform(slots, 16_384, HITS), Load.zipf(slots, 16_384, HITS, 1.05)
    for world in worlds:
        assert skewed.rows(world) < flat.rows(world) <= min(slots, world * 16_384 * HITS)
        assert skewed.owner_load(world) > world * skewed.hottest_share
        assert 1 <= flat.owner_load(world) < 1.02 < skewed.owner_load(world)
        assert skewed.owner_load(world, once=True) < skewed.owner_load(world)
    busiest = [skewed.owner_load(world) for world in worlds]
    assert busiest == sorted(busiest)


def test_groups_of_tokens_share_a_table_but_no_slots() -> None:
    whole, parts = Load.zipf(SLOTS, BAGS, HITS, 1.05), Load.zipf(4 * SLOTS, 4 * BAGS, HITS, 1.05, groups=4)
    assert parts.hottest_share == pytest.approx(whole.hottest_share / 4)
    assert parts.rows(1) == pytest.approx(4 * whole.rows(1), rel=0.01)


def test_what_a_run_has_counted_makes_a_load() -> None:
    slots_ML = drawn_bags(SUB_KEYS, 8192, HITS, 1.05, seed=2)
    usage = SlotUsage(SLOTS, "cpu")
    usage.count(slots_ML.flatten())
    written = json.loads(json.dumps(memory_usage({"layer": usage.read(SLOTS)})))
    measured, drawn = Load.from_usage(SLOTS, BAGS, HITS, written["layer"]), Load.zipf(SLOTS, BAGS, HITS, 1.05)
    assert float((measured.read_B * measured.slots_B).sum()) == pytest.approx(HITS, rel=1e-6)
    assert measured.hottest_share == pytest.approx(drawn.hottest_share, rel=0.03)
    assert measured.rows(1) == pytest.approx(drawn.rows(1), rel=0.01)
    assert 0.97 * drawn.rows(8) < measured.rows(8) < drawn.rows(8)  # a sixteenth of the bags that were counted
    for world in (8, 64):
        assert measured.owner_load(world) == pytest.approx(drawn.owner_load(world), rel=0.03)
    larger = Load.from_usage(16 * SLOTS, BAGS, HITS, written["layer"])
    assert int(larger.slots_B.sum()) == 16 * SLOTS
    assert larger.hottest_share == pytest.approx(measured.hottest_share / 16)
    smaller = Load.from_usage(SLOTS // 16, BAGS, HITS, written["layer"])
    assert int(smaller.slots_B.sum()) == SLOTS // 16
    assert smaller.hottest_share == pytest.approx(1 / HITS)  # in every bag, and no more than once
    assert float((smaller.read_B * smaller.slots_B).sum()) == pytest.approx(HITS)


def test_counted_bags_are_counted() -> None:
    slots = Placement.permuted(16).slot_of(torch.tensor([[0, 1], [0, 4], [8, 12], [8, 15]]))
    load = CountedLoad.of(16, slots, bags=2)
    assert load.owners_of_bag(4) == pytest.approx((1 + 2 + 2 + 2) / 4)
    assert (load.rows(1), load.rows(2)) == (3, 6)
    assert load.hottest_share == pytest.approx(2 / 8)


def test_rows_take_eight_bytes_where_a_rank_holds_two_to_the_31() -> None:
    def size(strategy: str, slots: int, name: str) -> float:
        messages = expected_bytes(strategy, 8, 8, Load.uniform(slots, BAGS, HITS), dim=64)
        return sum(message.bytes_inside for message in messages if message.name == name)

    sent = BAGS * HITS * 7 / 8
    for slots, row in ((2**34 - 8, 4), (2**34, 8)):
        assert size("row_gather", slots, "rows") == pytest.approx(sent * row)
        assert size("row_pooled", slots, "hits") == pytest.approx(sent * (row + 4))
    for slots, row in ((2**31 - 1, 4), (2**31, 8)):  # whole tables
        assert size("column", slots, "hits") == pytest.approx(8 * sent * (row + 4))


def test_what_no_layout_can_serve_is_refused() -> None:
    load = Load.uniform(SLOTS, BAGS, HITS)
    with pytest.raises(InputError, match="12 ranks are not a multiple of the 8 of a node"):
        expected_bytes("row_pooled", 12, 8, load, 64)
    for size in (4, 9):
        with pytest.raises(InputError, match=f"group_ranks={size}: 24 ranks in nodes of 6 are planned in groups"):
            expected_bytes("two_level", 24, 6, load, 64, group_ranks=size)
    with pytest.raises(InputError, match="width 64 leave a rank of 128 without columns"):
        expected_bytes("column", 128, 8, load, 64)
    with pytest.raises(InputError, match="100 slots leaves rank 50 of 64 without rows"):
        expected_bytes("row_pooled", 64, 8, Load.uniform(100, BAGS, HITS), 64)
    with pytest.raises(InputError, match="hits=32 distinct slots of 25"):
        Load.zipf(25, BAGS, HITS, 1.05)
    with pytest.raises(InputError, match="slots=50 is not 1 times a square"):
        Load.zipf(50, BAGS, HITS, 1.05)
    curves = [
        ([0, 1], None),
        ([0, 1], [0, 0]),
        ([1, 1], [0, 1]),
        ([0, 1], [1, 1]),
        ([0, 0.5], [0, 0.5, 1]),
        ([0, 0.5, 0.4, 1], [0, 0.2, 0.5, 1]),
        ([0, 0.5, 1], [0, math.nan, 1]),
        ([0, 0.5, 1], [0, -0.5, 1]),
        ([0], [1]),
        (0, 1),
        ([[0, 1]], [[0, 1]]),
    ]
    usages = [{"rank_curve": {"share_of_slots": slots, "share_of_hits": hits}} for slots, hits in curves]
    for usage in ({}, {"rank_curve": None}, *usages):
        with pytest.raises(InputError, match="memory_usage.json: rank_curve"):
            Load.from_usage(SLOTS, BAGS, HITS, usage)


def test_a_run_that_has_used_hardly_any_slot_has_a_bags_worth_of_them() -> None:
    """Distinct slots: a bag cannot read fewer."""
    for share in (1e-6, 1e-4, HITS / SLOTS):
        usage = {"rank_curve": {"share_of_slots": [0, share], "share_of_hits": [0, 1]}}
        load = Load.from_usage(SLOTS, BAGS, HITS, usage)
        assert float((load.read_B * load.slots_B).sum()) == pytest.approx(HITS)
        assert load.rows(8) == pytest.approx(HITS) and load.owner_load(8) >= 1


def test_squares_of_columns_travel_once_a_step() -> None:
    """The update waits for the gradients of all chunks."""
    load = Load.uniform(SLOTS, BAGS, HITS).in_chunks((BAGS // 2, BAGS // 2))
    once = {message.name: message.once for message in expected_bytes("column", 8, 8, load, dim=64)}
    assert [name for name, is_once in once.items() if is_once] == ["squares"]
