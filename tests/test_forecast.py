"""The time of a step that is compared with a plan: without the reader, on a CPU and behind a GPU's queue."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from msn_dist.training import forecast

READING, COMPUTING, LOGGING, STEPS = 5.0, 2.0, 1.0, 10


class Clock:
    """Seconds that pass when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def passes(self, seconds: float) -> None:
        self.now += seconds


class Event:
    """A GPU that is done with everything at once."""

    clock: Clock

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = self.clock.now

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.at - self.at)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(Event, "clock", clock, raising=False)
    monkeypatch.setattr(forecast.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    return clock


def test_a_run_of_few_steps_is_not_compared(clock: Clock) -> None:
    """All would be warm-up."""
    ranks = SimpleNamespace(rank=0, device=torch.device("cpu"))
    watch = forecast.Forecast(SimpleNamespace(seconds=1.0, allocated_W=[14]), ranks, 4)
    assert [watch.after(step) for step, _ in enumerate(watch.watched(range(4)), start=1)] == [None] * 4
    assert watch.seconds is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_step_is_timed_without_its_reader_and_without_the_log(device: str, clock: Clock) -> None:
    def batches():
        for number in range(STEPS + 3):
            clock.passes(READING)
            yield number

    ranks = SimpleNamespace(rank=0, device=torch.device(device))
    plan = SimpleNamespace(seconds=COMPUTING / 2, allocated_W=[14])
    watch = forecast.Forecast(plan, ranks, STEPS)
    said = []
    for step, _ in enumerate(watch.watched(batches()), start=1):
        clock.passes(COMPUTING if step > STEPS // 5 else 100.0)  # the first fifth is warm-up
        said.append(watch.after(step))
        clock.passes(LOGGING)
    assert watch.seconds == pytest.approx(COMPUTING)
    assert [step for step, text in enumerate(said, start=1) if text] == [STEPS]
    assert said[STEPS - 1].startswith("plan: 1000.0 ms a step (-50%), took 2000.0 ms")
    assert watch.bytes == (7 if device == "cuda" else None)
