"""How much of the time that messages travel is hidden behind computing.

A message travels from its departure until it is complete; what of that its receiver spends waiting is exposed, the
rest is hidden.  On a GPU both are measured by events on the streams, else by the clock.
"""

from __future__ import annotations

import time
from collections import deque

import torch
import torch.distributed as dist

_KEPT = 4096  # messages, if nobody reads


class Overlap:
    """Sums over the messages of one memory since the last reading."""

    def __init__(self, device: torch.device) -> None:
        self._span = _StreamSpan if device.type == "cuda" else _ClockSpan
        self._spans: deque[_StreamSpan | _ClockSpan] = deque(maxlen=_KEPT)

    def departed(self, work: dist.Work) -> _StreamSpan | _ClockSpan:
        """A message that has just been handed to the network."""
        self._spans.append(self._span(work))
        return self._spans[-1]

    def read(self) -> tuple[float, float]:
        """(seconds under way, seconds of these that were waited for) since the last call."""
        times = [span.seconds() for span in self._spans]
        self._spans.clear()
        return sum(flying for flying, _ in times), sum(waited for _, waited in times)


class _ClockSpan:
    completed = None  # waiting has seen to it

    def __init__(self, work: dist.Work) -> None:
        self._work = work
        self._start = time.perf_counter()
        self._waited_from = self._waited_until = self._complete = self._start
        work.get_future().add_done_callback(self._note)

    def _note(self, _: object) -> None:
        self._complete = time.perf_counter()

    def wait(self) -> None:
        self._waited_from = time.perf_counter()
        self._work.wait()
        self._work = None  # which holds what has travelled
        self._waited_until = time.perf_counter()

    def seconds(self) -> tuple[float, float]:
        # the note of a message that was waited for may come a moment late
        complete = min(self._complete, self._waited_until) if self._complete > self._start else self._waited_until
        return complete - self._start, max(0.0, complete - self._waited_from)


class _StreamSpan:
    def __init__(self, work: dist.Work) -> None:
        self._work = work
        self._start, self._waited_from, self._complete = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        self._start.record()

    def wait(self) -> None:
        self._waited_from.record()
        with torch.cuda.stream(_side_stream()):
            self._work.wait()
            self._complete.record()
        torch.cuda.current_stream().wait_event(self._complete)
        self._work = None  # which holds what has travelled

    def completed(self) -> bool:
        """Whether a message that was waited for has come: the host has not waited, the stream has."""
        return self._complete.query()

    def seconds(self) -> tuple[float, float]:
        self._complete.synchronize()
        flying = self._start.elapsed_time(self._complete) / 1e3
        waited = self._waited_from.elapsed_time(self._complete) / 1e3
        return max(0.0, flying), max(0.0, waited)


_side_streams: dict[int, torch.cuda.Stream] = {}


def _side_stream() -> torch.cuda.Stream:
    """A stream with nothing on it but the arrivals of messages, one for each device."""
    device = torch.cuda.current_device()
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream()
    return _side_streams[device]
