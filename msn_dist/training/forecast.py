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
    """Measures the steps up to the 50th, or up to the first evaluation.

    The time of a step is the training process's, without what it waits for the reader.  A GPU, which works behind the
    host, is waited for at either end.
    """

    def __init__(self, plan: PlanFile, ranks: Ranks, steps_to_evaluation: int) -> None:
        self._plan, self._ranks = plan, ranks
        self.last = min(_LAST, steps_to_evaluation)
        self._first = self.last // 5
        self._reading = self._start = 0.0
        self.seconds: float | None = None  # a step, once measured
        self.bytes: int | None = None  # most that tensors of this rank took, on a GPU

    def watched(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The same, while it is noted how long each was waited for."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._reading += time.perf_counter() - start
            yield batch

    def after(self, step: int) -> str | None:
        """To be called after every step; the comparison, once."""
        if step == self._first:
            self._start = self._now()
        elif step == self.last and self.last > self._first:
            self.seconds = (self._now() - self._start) / (self.last - self._first)
            if self._ranks.device.type == "cuda":
                self.bytes = torch.cuda.max_memory_allocated(self._ranks.device)
            return str(self)
        return None

    def _now(self) -> float:
        """Seconds spent on steps."""
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
        return time.perf_counter() - self._reading

    def __str__(self) -> str:
        said, took = 1e3 * self._plan.seconds, 1e3 * self.seconds
        text = f"plan: {said:.1f} ms a step, took {took:.1f} ms ({took / said - 1:+.0%})"
        if self.bytes is not None:
            planned = self._planned_bytes()
            text += f"; {planned / 2**30:.2f} GiB, took {self.bytes / 2**30:.2f} GiB ({self.bytes / planned - 1:+.1%})"
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
        return self._plan.bytes_W[self._ranks.rank]
