"""Machines and topologies: what profiles say, and the seconds that follow from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_plan_groups import NOTHING_ELSE
from test_planning import BETWEEN, ROOT, SCHEMA, situation

from msn_dist.errors import InputError
from msn_dist.planner.cost import _dense_gradients, message_seconds, operator_seconds
from msn_dist.planner.home_work import HomeWork
from msn_dist.planner.load import Message
from msn_dist.planner.machine import BUILT_IN, SINGLE, Collective, Curve, Machine, load_machine
from msn_dist.planner.search import Search
from msn_dist.planner.situation import Situation
from msn_dist.planner.topology import load_topology


def test_a_curve_is_straight_on_logarithmic_axes_and_constant_beyond_its_points() -> None:
    curve = Curve(points=[[10, 100], [1000, 1]], source="measured")
    assert curve.at(100) == pytest.approx(10)
    assert [curve.at(1), curve.at(10), curve.at(1000), curve.at(1e9)] == [100, 100, 1, 1]
    assert [curve.of_work(1), curve.of_work(1000), curve.of_work(4000)] == [100, 1, 0.25]


def test_rows_wider_than_were_measured_take_as_long_as_their_bytes() -> None:
    machine = load_machine("h200")
    widest = machine.row_update.points[-1][0]
    for seconds in (machine.read_seconds, machine.update_seconds):
        assert seconds(2**20, 2**20, 4 * widest) == pytest.approx(4 * seconds(2**20, 2**20, widest))


def test_retrieval_among_twice_the_sub_keys_that_were_measured_takes_twice_as_long() -> None:
    measured, beyond = (
        next(op for op in Search(situation(1, 8, sub_keys=sub_keys)).trace.ops if op.name == "retrieve")
        for sub_keys in (32_768, 65_536)
    )
    machine = load_machine("h200")
    assert operator_seconds(beyond, machine) == pytest.approx(2 * operator_seconds(measured, machine))


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_line_of_a_built_in_profile_tells_its_source(name: str) -> None:
    machine = load_machine(name)
    lines = [value for value in vars(machine).values() if hasattr(value, "source")]
    assert len(lines) >= 15
    assert all(value.source in ("measured", "datasheet", "estimated") for value in lines)
    if name != "h200":
        assert not any(value.source == "measured" for value in lines), "these machines have not been measured"


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "topology").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_topologies_that_come_along_are_valid(path: Path) -> None:
    topology = load_topology(path)
    assert topology.world == topology.nodes * topology.ranks_per_node
    if topology.machine in BUILT_IN:
        assert isinstance(load_machine(topology.machine), Machine)


def test_a_message_takes_the_slower_of_its_two_links() -> None:
    here = situation(2, 8)
    inside = here.machine.all_to_all
    small = Message("forward", "pooled", bytes_inside=1e9, bytes_between=1e6)
    assert message_seconds(small, here.machine, here.topology) == pytest.approx(inside.latency + 1e9 / inside.bandwidth)
    large = Message("forward", "pooled", bytes_inside=1e6, bytes_between=1e9, busiest=2.0)
    assert message_seconds(large, here.machine, here.topology) == pytest.approx(BETWEEN.latency + 2e9 / 40e9)


def test_a_collective_takes_what_was_measured_and_lies_on_no_line_where_the_measurement_does_not() -> None:
    points = [[1e3, 1e-4], [1e6, 1e-3], [1e8, 1.0]]
    measured = Collective(latency=1e-4, bandwidth=1e9, source="measured", points=points)
    assert [measured.seconds(size) for size, _ in points] == pytest.approx([1e-4, 1e-3, 1.0])
    assert measured.seconds(1e7) == pytest.approx(1e-3**0.5 * 1.0**0.5)
    assert [measured.seconds(0.0), measured.seconds(2e8)] == pytest.approx([1e-4, 2.0])
    assert Collective(latency=1e-4, bandwidth=1e9, source="datasheet").seconds(1e9) == pytest.approx(1.0001)
    with pytest.raises(ValueError, match="ascend"):
        Collective(latency=0.0, bandwidth=1e9, source="measured", points=points[::-1])


def test_messages_and_dense_gradients_take_what_was_measured() -> None:
    here = situation(1, 8)
    points = [[1e3, 1e-3], [1e9, 2.0]]
    measured = here.machine.all_to_all.model_copy(update={"points": points})
    machine = here.machine.model_copy(update={"all_to_all": measured, "all_reduce": measured})
    message = Message("forward", "pooled", bytes_inside=5e8, bytes_between=0.0, busiest=2.0)
    assert message_seconds(message, machine, here.topology) == pytest.approx(2.0)
    assert message_seconds(message, machine, here.topology, parts=2) == pytest.approx(2 * measured.seconds(5e8))
    time = _dense_gradients(replace(NOTHING_ELSE, parameter_bytes=2**20), machine, here.topology)
    assert time.seconds == pytest.approx(measured.seconds(2 * 2**20 * 7 / 8))


def test_rows_at_home_are_cheaper_by_the_kernels_and_cheapest_where_nothing_is_sorted() -> None:
    machine = load_machine("h200")

    def seconds(by_kernels: bool, once: bool) -> list[float]:
        work = HomeWork(2**20, 2**20, 256, by_kernels, once)
        return [work.forward(machine), work.backward(machine)]

    once, sorted_by_row, by_torch = seconds(True, True), seconds(True, False), seconds(False, True)
    assert once[0] == sorted_by_row[0] < by_torch[0]
    assert once[1] < sorted_by_row[1] < by_torch[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("between_nodes: {bandwidth_gb_s: 0, latency_us: 5}", "between_nodes.bandwidth_gb_s.*0.001, found 0"),
        ("nodes: 2", "between_nodes is missing"),
        ("gpus: 8", "gpus"),
        ("machine: b300", "b300, as the topology says, is no built-in profile"),
        ("device_gib: .inf", "device_gib.*finite"),
    ],
)
def test_a_topology_that_cannot_be_is_refused(change: str, message: str, tmp_path: Path) -> None:
    base = {"name": "x", "machine": "h200", "ranks_per_node": "8", "device_gib": "136"}
    key, _, value = change.partition(": ")
    lines = [f"{name}: {text}" for name, text in (base | {key: value}).items()]
    (tmp_path / "topology.yaml").write_text("\n".join(lines))
    with pytest.raises(InputError, match=message):
        load_machine(load_topology(tmp_path / "topology.yaml").machine)


def test_a_profile_of_other_ranks_is_refused_on_a_cpu() -> None:
    here = situation(1, 8)
    tree = json.loads(here.machine.model_dump_json()) | {"kind": "cpu", "ranks": 2}
    with pytest.raises(InputError, match="msn calibrate --nproc 8"):
        Situation(here.config, SCHEMA, here.topology, Machine.model_validate(tree))


def test_a_profile_of_an_earlier_version_is_refused_with_the_command_that_writes_it_anew(tmp_path: Path) -> None:
    tree = json.loads(load_machine("h200").model_dump_json()) | {"dispatch": {"seconds": 3e-5, "source": "measured"}}
    (tmp_path / "old.json").write_text(json.dumps(tree))
    with pytest.raises(
        InputError, match="old.json: is a profile of an earlier version; `msn calibrate --nproc 1 --output"
    ):
        load_machine(str(tmp_path / "old.json"))


def test_a_profile_of_one_gpu_says_nothing_of_links() -> None:
    here = situation(1, 8)
    none = Collective(latency=0.0, bandwidth=1e12, source="estimated", note="one rank sends nothing")
    alone = here.machine.model_copy(update={"all_to_all": none, "all_reduce": none})
    with pytest.raises(InputError, match="inside_node.*msn calibrate --nproc 8"):
        replace(here, machine=alone)
    inside = here.topology.model_copy(update={"inside_node": BETWEEN})
    assert replace(here, machine=alone, topology=inside).machine is alone


def test_rows_that_are_asked_for_have_rates_of_their_own() -> None:
    """A hit is a bag there, and has no weight."""
    here = situation(1, 8)
    none = dict.fromkeys((*SINGLE, "asked"))
    slow = {name: Curve(points=[[256, 1e6]], source="measured") for name in none}

    def seconds(rates: dict) -> dict[str, dict[str, float]]:
        search = Search(replace(here, machine=here.machine.model_copy(update=rates)))
        exact = (one for one in search.priced() if search.exact(one.layout))
        return {one.layout.strategy: {phase.name: phase.seconds for phase in one.time.phases} for one in exact}

    as_others, slower = seconds(none), seconds(slow)
    for strategy, phases in as_others.items():
        changed = {name for name in phases if slower[strategy].get(name, 0.0) > phases[name]}
        of_rows = {"look-up", "update"} if strategy.startswith("row_gather") else set()
        assert changed == of_rows | ({"hits by owner"} if strategy == "row_gather_unique" else set())


def test_the_rates_of_rows_that_are_asked_for_belong_together() -> None:
    tree = json.loads(load_machine("h200").model_dump_json())
    curve = {"points": [[256, 1e6]], "source": "measured"}
    with pytest.raises(ValueError, match="single_row_update belong together"):
        Machine.model_validate(tree | dict.fromkeys(SINGLE) | {"single_read": curve})
