"""The planner and the size of two_level's groups: which sizes are tried, the choice, its reason, and who follows it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from test_planning import situation

from msn_dist.errors import InputError
from msn_dist.planner.cost import ModelTime, message_seconds, step_time
from msn_dist.planner.exchange_storage import exchange_bytes
from msn_dist.planner.exchange_work import exchange_work
from msn_dist.planner.explain import WIDTH, explain
from msn_dist.planner.layout import Layout, group_sizes
from msn_dist.planner.load import expected_bytes
from msn_dist.planner.loopback import Distinct
from msn_dist.planner.plan_file import PlanFile, load_plan, write_plan
from msn_dist.planner.planning import plan
from msn_dist.planner.search import Search, in_best_groups
from msn_dist.planner.situation import Situation
from msn_dist.planner.topology import Link
from msn_dist.training.plan_card import plan_card

NOTHING_ELSE = ModelTime(dense=0.0, memory=0.0, optimizer=0.0, parameter_bytes=0)


def linked(nodes: int, ranks_per_node: int, inside_gb_s: float, **memory: object) -> Situation:
    """Between nodes 40 GB/s; 128 hits a bag, for which sums are less than rows."""
    here = situation(nodes, ranks_per_node, **{"sub_keys": 2048, "top_k": 128, "rows": 4096} | memory)
    inside = Link(bandwidth_gb_s=inside_gb_s, latency_us=20)
    return replace(here, topology=here.topology.model_copy(update={"inside_node": inside}))


def planned(here: Situation) -> PlanFile:
    return plan(here, rounding=False, date="2026-01-01")


@pytest.fixture(scope="module")
def slow_inside() -> tuple[Situation, PlanFile]:
    here = linked(8, 8, inside_gb_s=40)
    return here, planned(here)


def test_sizes_are_parts_of_a_node_and_several_nodes() -> None:
    assert group_sizes(512, 8) == [None, 2, 4, 16, 32, 64, 128, 256]
    assert group_sizes(36, 6) == [None, 2, 3, 12, 18]
    assert group_sizes(12, 4) == [None, 2] and group_sizes(4, 2) == group_sizes(1, 1) == [None]


@pytest.mark.parametrize(
    ("nodes", "ranks_per_node", "inside_gb_s", "expected"),
    [
        (8, 8, 360, None),  # links inside are much faster: what stays in a node costs little
        (2, 72, 360, None),
        (8, 72, 360, None),
        (8, 8, 100, None),
        (8, 8, 60, 16),  # less than twice as fast: two nodes use both kinds of links at once
        (8, 8, 40, 16),
        (8, 8, 20, 32),  # slower inside
        (8, 4, 10, 16),
    ],
)
def test_another_size_than_a_node_stands_for_two_level_only_where_it_takes_less_time(
    nodes: int, ranks_per_node: int, inside_gb_s: float, expected: int | None
) -> None:
    here = linked(nodes, ranks_per_node, inside_gb_s)
    found = in_best_groups(here, here.layout("two_level", "fp32", "fp32"), NOTHING_ELSE)
    seconds = {
        size: step_time(here, replace(found, group_ranks=size), NOTHING_ELSE, 0.0).exchange
        for size in group_sizes(here.topology.world, ranks_per_node)
    }
    assert found.group_ranks == expected == min(seconds, key=seconds.get)
    assert all(seconds[size] > seconds[expected] for size in seconds if size != expected)


def test_two_nodes_a_group_take_the_time_of_the_slower_of_both_links_in_each_message(slow_inside) -> None:
    here, _ = slow_inside
    messages = expected_bytes("two_level", 64, 8, here.load, here.dim, group_ranks=16)
    home = {message.name: message for message in messages if message.direction == "forward"}
    sums = here.load.bags * here.dim * 4
    assert home["pooled_in_group"].bytes_inside == pytest.approx(7 * 4 * sums)
    assert home["pooled_in_group"].bytes_between == pytest.approx(8 * 4 * sums)
    assert (home["pooled"].bytes_inside, home["pooled"].bytes_between) == pytest.approx((0, 3 * sums))
    seconds = sum(message_seconds(home[name], here.machine, here.topology) for name in ("pooled_in_group", "pooled"))
    assert seconds == pytest.approx(2 * 30e-6 + (8 * 4 + 3) * sums / 40e9)


def test_the_plan_says_which_groups_and_what_a_node_would_take(slow_inside) -> None:
    here, found = slow_inside
    assert (found.memory.strategy, found.memory.group_ranks) == ("two_level", 16)
    search = Search(here)
    (chosen,) = [one for one in search.priced() if one.layout.group_ranks == 16 and search.exact(one.layout)]
    nodes = search.time(replace(chosen.layout, group_ranks=None))
    assert found.seconds == pytest.approx(chosen.time.seconds)
    assert f"; in groups of a node: {nodes.seconds / chosen.time.seconds - 1:+.0%}; " in found.reason
    assert not any(rival.memory.strategy == "two_level" and not rival.rounds for rival in found.rivals)
    assert dict(found.seconds_over_ranks["two_level"])[64] == pytest.approx(found.seconds)
    console = Console(width=WIDTH, highlight=False)
    with console.capture() as capture:
        console.print(explain(found))
    printed = capture.get()
    assert "memory   two_level in groups of 16, values fp32, wire fp32" in printed
    assert max(map(len, printed.splitlines())) <= WIDTH
    card = plan_card(found, {})
    assert "Chosen: two_level in groups of 16, values fp32" in card.story
    assert card.grids[1].rows[0][0] == "two_level in groups of 16"


def test_groups_of_nodes_are_not_named() -> None:
    found = planned(linked(8, 8, inside_gb_s=360))
    assert (found.memory.strategy, found.memory.group_ranks) == ("two_level", None)
    assert "group" not in found.reason and "groups" not in plan_card(found, {}).story


def test_a_run_by_the_plan_has_its_groups_and_plans_without_the_key_have_nodes(slow_inside, tmp_path: Path) -> None:
    here, found = slow_inside
    trained = found.applied_to(here.config, here.schema).memory
    assert (trained.strategy, trained.group_ranks) == ("two_level", 16)
    named = here.config.memory.model_copy(update={"strategy": "two_level", "group_ranks": 4})
    assert found.applied_to(here.config.model_copy(update={"memory": named}), here.schema).memory.group_ranks == 16
    write_plan(found, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == found
    text = (tmp_path / "plan.json").read_text()
    assert ',\n  "group_ranks": 16' in text
    (tmp_path / "old.json").write_text(text.replace(',\n  "group_ranks": 16', ""))
    old = load_plan(tmp_path / "old.json")
    assert old.memory.group_ranks is None
    assert old.applied_to(here.config.model_copy(update={"memory": named}), here.schema).memory.group_ranks is None
    with pytest.raises(InputError, match="the plan's memory: group_ranks=16 is set, and strategy: column"):
        broken = text.replace('"strategy": "two_level"', '"strategy": "column"')
        (tmp_path / "broken.json").write_text(broken)
        load_plan(tmp_path / "broken.json").applied_to(here.config, here.schema)


@pytest.mark.parametrize("wire", ["fp32", "int8"])
def test_what_two_level_holds_does_not_depend_on_its_groups(wire: str) -> None:
    """So the fastest size may be chosen before it is known what fits, and what nodes hold tells what it holds."""
    held = {
        exchange_bytes(Layout(32, 8, "two_level", wire, group_ranks=size), 2**16, 16, 256, 8)
        for size in group_sizes(32, 8)
    }
    assert len(held) == 1


@pytest.mark.parametrize("lookup", ["reference", "triton"])
def test_two_level_of_many_groups_holds_more_than_row_pooled_which_it_contains(lookup: str) -> None:
    distinct = Distinct(by_chunk=200_000, of_all=30_000_000)
    for nodes in (16, 64):
        found = {
            strategy: exchange_bytes(
                Layout(8 * nodes, 8, strategy, "bf16", "bf16", lookup), 2**30, 64, 8192, 32, distinct=distinct
            )
            for strategy in ("row_pooled", "two_level")
        }
        assert found["two_level"].forward > 0.9 * found["row_pooled"].forward
        assert found["two_level"].backward > 0.9 * found["row_pooled"].backward


def test_larger_groups_have_less_of_a_second_level(slow_inside) -> None:
    here, _ = slow_inside
    passes = [
        sum(work.forward) + sum(work.backward)
        for size in (4, 8, 16)
        for work in [exchange_work(Layout(64, 8, "two_level", group_ranks=size), here.load, here.dim)]
    ]
    row = here.load.bags * here.dim * 4
    assert passes[0] - passes[1] == pytest.approx(2 * (64 // 4 - 64 // 8) * row)
    assert passes[1] - passes[2] == pytest.approx(2 * (64 // 8 - 64 // 16) * row)
