"""What a plan said of a step, beside what the steps of the run take."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch

from msn_dist.planner.plan_file import PlanFile
from msn_dist.training.ranks import Ranks

Item = TypeVar("Item")
_LAST = 50  # the first fifth is warm-up


class Forecast:
    """Measures the steps up to the 50th, or up to the first evaluation; nothing if that comes before the fifth.

    The time of a step is without what it waits for the reader: on a CPU that of the training process between two reads;
    on a GPU, which works behind its host, from when it comes to what a step asks of it until that is done.
    """

    def __init__(self, plan: PlanFile, ranks: Ranks, steps_to_evaluation: int) -> None:
        self._plan, self._ranks = plan, ranks
        self.last = min(_LAST, steps_to_evaluation)
        self._first = self.last // 5
        self._clock = (_DeviceClock if ranks.device.type == "cuda" else _HostClock)()
        self.seconds: float | None = None  # a step, once measured
        self.bytes: int | None = None  # most that tensors of this rank took, on a GPU

    def watched(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The same, while it is noted when each has come."""
        for batch in batches:
            self._clock.begin()
            yield batch

    def after(self, step: int) -> str | None:
        """To be called after every step; the comparison, once."""
        if self._first < step <= self.last:
            self._clock.end()
        if step == self.last and self._first:
            self.seconds = self._clock.seconds() / (self.last - self._first)
            if self._ranks.device.type == "cuda":
                self.bytes = torch.cuda.max_memory_allocated(self._ranks.device)
            return str(self)
        return None

    def __str__(self) -> str:
        said, took = 1e3 * self._plan.seconds, 1e3 * self.seconds
        text = f"plan: {said:.1f} ms a step ({said / took - 1:+.0%}), took {took:.1f} ms"
        if self.bytes is not None:
            planned = self._planned_bytes()
            text += f"; {planned / 2**30:.2f} GiB of tensors at most ({planned / self.bytes - 1:+.1%})"
            text += f", took {self.bytes / 2**30:.2f}"
        return text

    def summary(self) -> dict[str, Any]:
        """For summary.json: this rank's."""
        return {
            "seconds_planned": self._plan.seconds,
            "seconds_measured": self.seconds,
            "bytes_planned": self._planned_bytes(),
            "bytes_measured": self.bytes,
        }

    def _planned_bytes(self) -> int:
        return self._plan.allocated_W[self._ranks.rank]


class _HostClock:
    """Time of this process from every `begin` to the `end` after it."""

    def __init__(self) -> None:
        self._begun = self._seconds = 0.0

    def begin(self) -> None:
        self._begun = time.perf_counter()

    def end(self) -> None:
        self._seconds += time.perf_counter() - self._begun

    def seconds(self) -> float:
        return self._seconds


class _DeviceClock:
    """The GPU's time: a `begin` counts from when all before it is done, or from now if it is done already."""

    def __init__(self) -> None:
        self._begun: torch.cuda.Event | None = None
        self._steps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self) -> None:
        self._begun = torch.cuda.Event(enable_timing=True)
        self._begun.record()

    def end(self) -> None:
        ended = torch.cuda.Event(enable_timing=True)
        ended.record()
        self._steps.append((self._begun, ended))

    def seconds(self) -> float:
        torch.cuda.synchronize()
        return sum(begun.elapsed_time(ended) for begun, ended in self._steps) / 1e3
