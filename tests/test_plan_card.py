from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from test_report import SUMMARY, Page, make_run

from msn_dist.errors import InputError
from msn_dist.planner.plan_file import PlanFile, PlannedMemory, PlannedPhase, Rival, write_plan
from msn_dist.training.figures import SERIES_COLORS, Chart, three
from msn_dist.training.plan_card import plan_card
from msn_dist.training.report import write_report

GIB, MIB = 2**30, 2**20
PHASES = [("dense network", 20e-3, 0.0), ("sums home", 6e-3, 4e-3), ("update", 3e-3, 0.0)]


def memory(strategy: str) -> PlannedMemory:
    return PlannedMemory(strategy=strategy, wire="bf16", value_dtype="fp32")


def planned(**changed: Any) -> PlanFile:
    """25 ms a step on 2 ranks, the second of which is the fullest."""
    fields = {
        "config": "demo",
        "topology": "one node",
        "machine": "a machine",
        "date": "2026-01-31",
        "demand": "1,024 rows a rank",
        "world_size": 2,
        "ranks_per_node": 2,
        "settings": {},
        "memory": memory("row_pooled"),
        "id_tables": {},
        "capacity": 16 * GIB,
        "storage": {"values": [8 * GIB, 8 * GIB], "id tables": [GIB, 4 * GIB], "margin": [GIB // 2, 0]},
        "phases": [PlannedPhase(name=name, seconds=s, hidden=hidden, sent=0) for name, s, hidden in PHASES],
        "owner_load": 1.0,
        "reason": "row_gather would take +20.0%",
        "rivals": [
            Rival(
                memory=memory("row_gather"),
                seconds=30e-3,
                bytes=20 * GIB,
                allocated=19 * GIB,
                rounds=False,
                why="lacks 4.0 GiB",
            )
        ],
        "seconds_over_ranks": {"row_gather": [[2, 30e-3], [4, 40e-3]], "row_pooled": [[2, 25e-3], [4, 26e-3]]},
    }
    return PlanFile(**fields | changed)


def charts(plan: PlanFile, measured: float | None = None) -> dict[str, Chart]:
    card = plan_card(plan, {} if measured is None else {"seconds_measured": measured})
    return {chart.title: chart for chart in card.charts}


def texts(chart: Chart) -> list[str]:
    return re.findall(r">([^<>]+)</text>", chart.svg)


def dashed_lines(chart: Chart) -> int:
    return chart.svg.count("stroke-dasharray")


def bars(chart: Chart, number: int) -> list[tuple[float, float, float]]:
    """(left, width, height) of the bars of a colour, in the order drawn."""
    found = []
    for path in re.findall(rf'<path d="([^"]*)"[^>]*fill: var\(--series-{number}\)', chart.svg):
        points = [float(value) for value in re.findall(r"-?\d+(?:\.\d+)?", path)]
        x, y = points[::2], points[1::2]
        found.append((min(x), max(x) - min(x), max(y) - min(y)))
    return found


def test_planned_run_shows_plan_forecast_and_rivals(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=3)
    write_plan(planned(), run.planned_file)
    forecast = {"seconds_planned": 25e-3, "seconds_measured": 26e-3, "bytes_planned": 9 * GIB, "bytes_measured": None}
    run.write_summary(SUMMARY | {"forecast": forecast})
    page = Page(write_report(tmp_path))
    assert page.open == []
    assert all(address.startswith("#") for address in page.addresses)
    for words in (
        "Made for one node: 2 ranks (1 x 2) of a machine. "
        "Chosen: row_pooled, values fp32, wire bf16, because row_gather would take +20.0%.",
        "values 8 id tables 4",
        "Rank 1, the fullest, takes 12 GiB of the 16 GiB that it may fill, the dashed line.",
        "dense network 20 sums home 2 + 4 hidden update 3",
        "The dashed line is a step as measured, 26 ms.",
        "time of a step 25 ms 26 ms -3.8%",
        "tensors of rank 0, at most 9 GiB - -",
        "row_pooled fp32 bf16 25 ms 12 GiB chosen row_gather fp32 bf16 30 ms 20 GiB lacks 4.0 GiB",
    ):
        assert words in page.text


def test_run_without_a_plan_has_no_such_section(tmp_path: Path) -> None:
    make_run(tmp_path, steps=3)
    assert "<h2>Plan</h2>" not in Page(write_report(tmp_path)).source


def test_unfinished_run_shows_its_plan_and_nothing_measured(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=3)
    write_plan(planned(), run.planned_file)
    page = Page(write_report(tmp_path))
    assert "time of a step 25 ms - - tensors of rank 0, at most 9 GiB - -" in page.text
    assert dashed_lines(charts(planned())["Time of a step, ms"]) == 0


def test_broken_plan_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=3)
    run.planned_file.write_text("{")
    with pytest.raises(InputError, match=r"planned\.json: .*not valid JSON"):
        write_report(tmp_path)


def test_bars_are_in_proportion_to_bytes() -> None:
    chart = charts(planned())["Memory of each rank, GiB"]
    (_, _, values_0), (_, _, values_1) = bars(chart, 0)
    (_, _, tables_0), (_, _, tables_1) = bars(chart, 1)
    assert [values_1 / values_0, tables_0 / values_0, tables_1 / values_0] == pytest.approx([1, 1 / 8, 4 / 8], rel=1e-3)


@pytest.mark.parametrize(("capacity", "lines"), [(16 * GIB, 1), (100 * GIB, 0)])
def test_capacity_is_drawn_where_it_is_near(capacity: int, lines: int) -> None:
    chart = charts(planned(capacity=capacity))["Memory of each rank, GiB"]
    assert dashed_lines(chart) == lines
    assert ("dashed" in chart.how) == bool(lines)


def test_small_models_are_shown_in_mib() -> None:
    chart = charts(planned(storage={"values": [16 * MIB, 16 * MIB]}))["Memory of each rank, MiB"]
    assert chart.legend == [("values", "16", "--series-0")]


@pytest.mark.parametrize("fullest", [0, 1, 37, 63])
def test_of_many_ranks_sixteen_are_shown_with_the_fullest(fullest: int) -> None:
    values = [GIB] * 64
    values[fullest] = 2 * GIB
    plan = planned(world_size=64, ranks_per_node=8, storage={"values": values})
    chart = charts(plan)["Memory of 16 of the ranks, GiB"]
    ranks = [int(text) for text in texts(chart) if text.isdigit()][:16]
    assert len(set(ranks)) == 16 and ranks == sorted(ranks) and fullest in ranks
    heights = [height for _, _, height in bars(chart, 0)]
    assert heights.index(max(heights)) == ranks.index(fullest)


def test_kinds_too_small_to_see_are_merged_and_empty_ones_left_out() -> None:
    storage = {"values": [9 * GIB] * 2, "counters": [8 * MIB] * 2, "none": [0, 0], "keys": [8 * MIB] * 2}
    chart = charts(planned(storage=storage))["Memory of each rank, GiB"]
    assert [(label, value) for label, value, _ in chart.legend] == [("values", "9"), ("rest", "0.0156")]


def test_a_kind_that_one_rank_alone_has_is_not_merged() -> None:
    storage = {"values": [GIB] * 50, "counters": [MIB] * 50, "keys": [MIB] * 50, "id table": [0] * 49 + [GIB // 10]}
    plan = planned(world_size=50, ranks_per_node=50, storage=storage)
    assert [label for label, _, _ in charts(plan)["Memory of 16 of the ranks, GiB"].legend] == [
        "values",
        "id table",
        "rest",
    ]


def test_more_kinds_than_colors_lose_none_of_their_bytes() -> None:
    storage = {f"kind {number}": [number * GIB, number * GIB] for number in range(1, 14)}
    legend = charts(planned(storage=storage))["Memory of each rank, GiB"].legend
    assert len(legend) == len({color for _, _, color in legend}) == SERIES_COLORS
    assert legend[-1][:2] == ("rest", "10") and legend[0][:2] == ("kind 5", "5")


def test_what_is_hidden_lies_below_the_step_and_pale() -> None:
    chart = charts(planned(), measured=26e-3)["Time of a step, ms"]
    assert {"step", "hidden"} <= set(texts(chart))
    dense, _ = bars(chart, 0)
    home, hidden = bars(chart, 1)
    assert home[0] == pytest.approx(dense[0] + dense[1], abs=0.01)
    assert hidden[0] == pytest.approx(dense[0], abs=0.01)
    assert hidden[1] / home[1] == pytest.approx(4 / 2, rel=1e-3)
    assert dashed_lines(chart) == 1
    assert "opacity" in chart.svg


def test_nothing_hidden_is_one_bar_without_a_name() -> None:
    chart = charts(planned(phases=[PlannedPhase(name="update", seconds=1e-3, hidden=0, sent=0)]))["Time of a step, ms"]
    assert not {"step", "hidden"} & set(texts(chart))
    assert len(bars(chart, 0)) == 1


def test_curves_over_ranks_start_with_the_chosen_and_say_what_they_are_here() -> None:
    chart = charts(planned())["Step time over ranks, ms"]
    assert chart.legend == [("row_pooled", "25", "--series-0"), ("row_gather", "30", "--series-1")]
    assert "leaves the picture" not in chart.how


def test_a_strategy_out_of_all_proportion_does_not_flatten_the_others() -> None:
    curves = {"row_pooled": [[2, 25e-3], [4, 26e-3]], "replicated": [[4, 9.0], [8, 9.0]]}
    chart = charts(planned(seconds_over_ranks=curves))["Step time over ranks, ms"]
    assert "takes over 4 times as long" in chart.how
    assert chart.legend[1][:2] == ("replicated", "-")  # not possible on 2 ranks
    assert not any(text in ("1000", "10000") for text in texts(chart))


@pytest.mark.parametrize("curves", [{}, {"row_pooled": [[1, 25e-3]]}])
def test_a_model_without_memory_on_one_rank(curves: dict[str, list[list[float]]]) -> None:
    reason = "the model has no memory"
    storage = {"id tables": [GIB]}
    one = {"world_size": 1, "ranks_per_node": 1, "storage": storage, "memory": None, "rivals": [], "reason": reason}
    card = plan_card(planned(**one, seconds_over_ranks=curves), {})
    assert card.story == "Made for one node: 1 rank (1 x 1) of a machine; the model has no memory."
    assert [chart.title for chart in card.charts] == ["Memory of each rank, GiB", "Time of a step, ms"]
    assert len(card.grids) == 1


def test_colors_of_every_figure_are_the_pages() -> None:
    for chart in charts(planned(), measured=26e-3).values():
        assert not re.search(r"#[0-9a-f]{6}", chart.svg)


def test_the_page_has_every_color_in_light_and_dark(tmp_path: Path) -> None:
    make_run(tmp_path)
    source = Page(write_report(tmp_path)).source
    assert all(source.count(f"--series-{number}:") == 2 for number in range(SERIES_COLORS))


@pytest.mark.parametrize(("value", "text"), [(0.02134, "0.0213"), (12.34, "12.3"), (999.6, "1,000"), (1234.5, "1,234")])
def test_three_digits(value: float, text: str) -> None:
    assert three(value) == text
