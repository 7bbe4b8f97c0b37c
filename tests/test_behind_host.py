"""Steps of a GPU and its host: what both take together, and what calibration makes of steps that it times.

Shape suffixes: I operators.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from msn_dist.planner import calibration
from msn_dist.planner.behind_host import Stretch
from msn_dist.planner.cost import WAITING, ModelTime, Phase, StepTime, _behind_host, operator_seconds
from msn_dist.planner.dense_trace import trace_step
from msn_dist.planner.machine import Dispatch
from msn_dist.planner.search import Search
from msn_dist.planner.situation import Situation
from msn_dist.planner.step_recorder import Op
from msn_dist.training.tiny_step import tiny_config
from tests.test_planning import situation


def played(hosts_I: list[float], devices_I: list[float]) -> float:
    """When the last result is there, operator by operator."""
    host = device = 0.0
    for dispatch, seconds in zip(hosts_I, devices_I, strict=True):
        host += dispatch
        device = max(device, host) + seconds
    return device


@pytest.mark.parametrize("seed", range(8))
def test_a_row_spans_what_operators_one_by_one_do_however_it_is_parted(seed: int) -> None:
    hosts_I, devices_I = torch.rand(2, 20, generator=torch.Generator().manual_seed(seed)).tolist()
    total = Stretch()
    for first, last in pairwise((0, 3, 11, 20)):
        part = Stretch()
        for host, device in zip(hosts_I[first:last], devices_I[first:last], strict=True):
            part = part.then(Stretch.one(host, device))
        total = total.then(part)
    assert total.span == pytest.approx(played(hosts_I, devices_I))
    assert (total.host, total.device) == (pytest.approx(sum(hosts_I)), pytest.approx(sum(devices_I)))


def test_a_slow_forward_of_the_host_is_not_made_up_for_by_a_slow_backward_of_the_device() -> None:
    forward, backward = Stretch.of([0.01] * 10, dispatch=1.0), Stretch.of([1.0] * 10, dispatch=0.01)
    assert forward.then(backward).span == pytest.approx(20, rel=0.02)
    assert Stretch.of([1.0] * 10, dispatch=1.0).span == pytest.approx(11)


def step_of(here: Situation, **dispatch: float) -> StepTime:
    given = {"operator": 0.0, "memory": 0.0, "step": 0.0, "source": "measured"} | dispatch
    machine = here.machine.model_copy(update={"dispatch": Dispatch(**given)})
    return Search(replace(here, machine=machine)).fastest().time


def test_a_step_takes_what_its_host_does_or_its_device_and_names_the_difference() -> None:
    here = situation(1, 8)
    device = step_of(here).device
    assert step_of(here).seconds == pytest.approx(device)
    for host in ({"memory": 10.0}, {"step": 10.0}):
        time = step_of(here, **host)
        all_of_it = sum(host.values()) * (here.memories if "memory" in host else 1)
        assert all_of_it < time.seconds < all_of_it + device
        (waiting,) = (phase.seconds for phase in time.phases if phase.name == WAITING)
        assert waiting == pytest.approx(time.seconds - time.device)
    lead = step_of(here, step=1e-4).seconds - device
    assert lead == pytest.approx(1e-4 / 4)  # TorchRec's question; the rest is dispatched while the device works


@pytest.mark.parametrize(("look_up", "seconds"), [(8.0, 2.5 + 8.0), (2.0, 4 + 4)])
def test_a_device_works_off_one_chunk_while_its_host_dispatches_the_next(look_up: float, seconds: float) -> None:
    """4 chunks, for each of which the host takes .5 s before, .5 s at the look-up and 1 s in the backward."""
    phases = [Phase("id tables", 0.0), Phase("dense gradients", 0.0), Phase("look-up", look_up)]
    dispatch = Dispatch(operator=0.0, memory=2.0, step=0.0, source="measured")
    assert _behind_host(phases, [Stretch()] * 3, 1, 4, False, dispatch) == pytest.approx(seconds)


@pytest.mark.parametrize(("asks", "seconds"), [(False, 0.5 + 6 + 8), (True, 0.5 + 6 + 0.5 + 8)])
def test_a_host_that_asks_for_counts_has_nothing_ahead_when_it_has_them(asks: bool, seconds: float) -> None:
    seconds_of = {"id tables": 0.0, "dense gradients": 0.0, "hits by owner": 6.0, "look-up": 8.0}
    phases = [Phase(*of_phase) for of_phase in seconds_of.items()]
    dispatch = Dispatch(operator=0.0, memory=2.0, step=0.0, source="measured")
    assert _behind_host(phases, [Stretch()] * 3, 1, 1, asks, dispatch) == pytest.approx(seconds)


@pytest.mark.parametrize("ranks", [1, 8])
def test_every_memory_over_ranks_asks_once_unless_it_is_replicated(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    search = Search(situation(1, ranks, chunks=2), rounding="left out")
    asked: list[Stretch] = []
    monkeypatch.setattr(Stretch, "awaited", lambda stretch: asked.append(stretch) or stretch)
    for layout in search.layouts:
        asked.clear()
        search.time(layout)
        asks = ranks > 1 and layout.strategy != "replicated"
        assert len(asked) == (search.situation.memories if asks else 0), layout


@pytest.mark.parametrize(("dtype", "width"), [("float32", 128), ("bfloat16", 256)])
def test_rows_by_index_are_priced_by_their_bytes_and_sums_by_their_numbers(dtype: str, width: int) -> None:
    machine = situation(1, 8).machine
    read = Op("aten.index_select", "dense", False, 0, 0, 10**6 * width, ((50, width), (10**6,)), dtype)
    assert operator_seconds(read, machine) == pytest.approx(10**6 * 128 / machine.index_select.at(128))
    many = Op("aten.index_add", "dense", True, 0, 0, 0, ((50, width), (10**6,), (10**6, width)), dtype)
    assert operator_seconds(many, machine) == 10**6 * width / machine.index_add.at(width)


def test_what_is_sharded_parts_the_operators_of_a_step() -> None:
    here = situation(1, 8)
    trace = trace_step(here.config, here.schema, here.rows, "cuda")
    assert list(trace.memories_at) == sorted(trace.memories_at) and len(trace.memories_at) == 2 * here.memories
    for place in trace.memories_at[: here.memories]:
        assert trace.ops[place - 1].region == "retrieval" and trace.ops[place].region == "gate"
    for place in trace.memories_at[here.memories :]:
        assert trace.ops[place - 1].region == "gate" and trace.ops[place].region == "retrieval"
        assert trace.ops[place].backward
    model = ModelTime.of(trace, here.machine)
    assert len(model.stretches) == 2 * here.memories + 1
    seconds = sum(operator_seconds(op, here.machine) for op in trace.ops)
    assert sum(stretch.device for stretch in model.stretches) == pytest.approx(seconds)


def test_calibration_finds_what_an_operator_a_memory_and_a_step_take_the_host() -> None:
    spent = {"operator": 4e-5, "memory": 3e-3, "step": 5e-3}
    made: list[tuple[int, int]] = []

    def tiny(layers: int, memories: int) -> tuple:
        made.append((layers, memories))
        return *tiny_config(layers, memories, world=1), lambda: None

    def host_seconds(steps: list, calls: int) -> list[float]:
        return [
            spent["step"] + memories * spent["memory"] + operators(layers, memories) * spent["operator"]
            for layers, memories in made
        ]

    def operators(layers: int, memories: int) -> int:
        return len(trace_step(*tiny_config(layers, memories, world=1), "cuda").ops)

    said: list[str] = []
    found = calibration._dispatch(SimpleNamespace(host_seconds=host_seconds), tiny, said.append)
    assert {name: getattr(found, name) for name in spent} == pytest.approx(spent) and not said


def test_a_calibration_that_cannot_tell_what_the_host_takes_says_so() -> None:
    said: list[str] = []
    alike = SimpleNamespace(host_seconds=lambda steps, calls: [0.01] * 3)
    found = calibration._dispatch(alike, lambda *shape: (*tiny_config(*shape, world=1), lambda: None), said.append)
    assert (found.operator, found.memory) == (0.0, 0.0)
    assert said == ["note: what the host takes is lost in what else runs here, and stands as 0 in part; repeat it"]
