"""The planner and ranks that share cores: what they wait for the slowest of them at every collective."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from rich.console import Console
from test_plan_groups import NOTHING_ELSE
from test_planning import situation

from msn_dist.planner.cost import STRAGGLING, Phase, step_time
from msn_dist.planner.explain import explain_machine
from msn_dist.planner.machine import Machine
from msn_dist.planner.situation import Situation

MODEL = replace(NOTHING_ELSE, dense=0.05, memory=0.01, parameter_bytes=2**20)
OF_IDS_AND_GRADIENTS = 3  # collectives: embeddings home and their gradients, and one bucket of dense gradients


def sharing_cores(here: Situation, size: float, share: float) -> Situation:
    tree = json.loads(here.machine.model_dump_json())
    tree["straggling"] = {"points": [[size, share]], "source": "measured"}
    return replace(here, machine=Machine.model_validate(tree))


def phases(here: Situation, strategy: str) -> dict[str, Phase]:
    time = step_time(here, here.layout(strategy, "fp32", "fp32"), MODEL, id_seconds=0.02)
    return {phase.name: phase for phase in time.phases}


def test_a_share_of_what_ranks_compute_is_waited_for() -> None:
    found = phases(sharing_cores(situation(1, 8), 1.0, 0.25), "row_pooled")
    computing = sum(phase.seconds for phase in found.values() if not phase.sent) - found[STRAGGLING].seconds
    assert computing > MODEL.dense + MODEL.memory + 0.02
    assert found[STRAGGLING].exposed == pytest.approx(computing / 4)


@pytest.mark.parametrize(("strategy", "messages"), [("row_pooled", 5), ("row_gather", 4), ("row_gather_unique", 4)])
@pytest.mark.parametrize("chunks", [1, 2])
def test_beyond_a_time_slice_every_collective_costs_as_long(strategy: str, messages: int, chunks: int) -> None:
    """Counts and hits or rows, sums or values home, and what goes back; lengths travel with the hits."""
    here = sharing_cores(situation(1, 8, chunks=chunks), 1e-6, 0.5)
    together = OF_IDS_AND_GRADIENTS + messages * chunks
    assert phases(here, strategy)[STRAGGLING].seconds == pytest.approx(0.5e-6 * together)


def test_tables_of_replicated_travel_once_a_step_whatever_the_chunks() -> None:
    found = [
        phases(sharing_cores(situation(1, 8, chunks=chunks, sub_keys=64), 1e-6, 0.5), "replicated") for chunks in (1, 8)
    ]
    for name in (STRAGGLING, "gradients"):
        assert found[0][name].seconds == pytest.approx(found[1][name].seconds)


def test_one_rank_waits_for_nobody_and_ranks_with_devices_of_their_own_are_not_measured() -> None:
    assert STRAGGLING not in phases(sharing_cores(situation(1, 1), 1.0, 0.25), "row_pooled")
    assert STRAGGLING not in phases(situation(1, 8), "row_pooled")


def test_a_profile_shows_it_as_a_share() -> None:
    console = Console(width=80)
    with console.capture() as shown:
        console.print(explain_machine(sharing_cores(situation(1, 8), 0.001, 0.125).machine))
    (line,) = (line.split() for line in shown.get().splitlines() if "straggling" in line)
    assert line == ["straggling", "12.5%", "12.5%", "measured"]
