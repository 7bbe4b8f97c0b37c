"""Times one operation on this rank while all ranks do the same: what calibration is made of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

_SECONDS, _ROUNDS = 0.08, 3  # spent on an operation in a round
_TURNS = 5
_CALLS = {"cpu": 1000, "cuda": 200}  # timed together, at most; a GPU's queue holds some 1,000 kernels
_CYCLES = 2e9  # a second, at most


class Stopclock:
    """The median of some rounds on each rank, then the mean over ranks; every method is a collective call of `control`.

    A round is as long as some time slices of the system: with more ranks than cores, a single call would be as fast as
    with one.
    """

    def __init__(self, device: torch.device, control: dist.ProcessGroup) -> None:
        self.device, self._control = device, control
        self.unsteady = 1.0  # what is taken of an operation's rounds, over the fastest of them on this rank, at most

    def seconds(self, call: Callable[[], Any], *, warm: bool = False) -> float:
        """One call, on the device; ranks may make different numbers of calls.

        `warm`: as many rounds come before those that count, and may be as unsteady as they like.
        """
        if warm:
            self._rounds(call)
        rounds = self._rounds(call)
        # not of collectives: ranks that share cores come to them when the system lets them
        self.unsteady = max(self.unsteady, statistics.median(rounds) / min(rounds))
        return self._settled(rounds)

    def _rounds(self, call: Callable[[], Any]) -> list[float]:
        """Seconds of one call in each round."""
        call()
        self.together()
        once = self._timed(call, 1)
        calls = max(1, min(_CALLS[self.device.type], int(_SECONDS / 10 / max(once, 1e-7))))
        rounds = []
        for _ in range(_ROUNDS):
            self.together()
            until, spent, made = time.perf_counter() + _SECONDS, 0.0, 0
            # all ranks for as long, whatever each of them manages; one call even where the system came back too late
            while not made or time.perf_counter() < until:
                spent, made = spent + self._timed(call, calls), made + calls
            rounds.append(spent / made)
        return rounds

    def collective(self, call: Callable[[], Any], calls: int) -> float:
        """One call that needs all ranks."""
        call()
        rounds = []
        for _ in range(_ROUNDS):
            self.together()
            rounds.append(self._timed(call, calls) / calls)
        return self._settled(rounds)

    def added(self, call: Callable[[], Any], to: Callable[[], Any], calls: int) -> float:
        """What `call`, which needs all ranks, adds to each of so many calls of `to` that it comes after.

        Both are timed in turns, so that a machine which gets slower meanwhile counts in both.
        """

        def both() -> None:
            to()
            call()

        rounds = []
        for _ in range(_TURNS):
            self.together()
            alone = self._timed(to, calls)
            self.together()
            rounds.append((self._timed(both, calls) - alone) / calls)
        return self.mean(statistics.median(rounds))

    def _settled(self, rounds: list[float]) -> float:
        return self.mean(statistics.median(rounds))

    def host_seconds(self, steps: Sequence[Callable[[], Any]], calls: int) -> list[float]:
        """What the host spends on one call of each, which has next to nothing for the device.

        They are timed in turns, so that a host which gets slower meanwhile does so in all of them.
        """
        rounds: list[list[float]] = [[] for _ in steps]
        for turn in range(1 + _TURNS):  # the first is a warm-up
            for step, seconds in zip(steps, rounds, strict=True):
                self.together()
                start = time.perf_counter()
                for _ in range(calls):
                    step()
                if turn:
                    seconds.append((time.perf_counter() - start) / calls)
        self.unsteady = max(self.unsteady, *(statistics.median(seconds) / min(seconds) for seconds in rounds))
        return [self._settled(seconds) for seconds in rounds]

    def mean(self, number: float) -> float:
        """Over all ranks."""
        return self._reduced(number, dist.ReduceOp.SUM) / self._control.size()

    def most(self, number: float) -> float:
        """Of all ranks."""
        return self._reduced(number, dist.ReduceOp.MAX)

    def _reduced(self, number: float, by: dist.ReduceOp) -> float:
        reduced = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(reduced, by, group=self._control)
        return float(reduced)

    def together(self) -> None:
        """All ranks have come here."""
        self._wait()
        dist.barrier(group=self._control)

    def _timed(self, call: Callable[[], Any], calls: int) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(calls):
                call()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        call()
        queued = time.perf_counter() - begin
        torch.cuda.synchronize(self.device)
        # the device waits while calls are queued, so that the host's time does not count
        torch.cuda._sleep(int((1.5 * queued * calls + 1e-3) * _CYCLES))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
