"""Bytes of all tensors of this process over time, as torch's CPU allocator reports them to its profiler."""

from __future__ import annotations

import warnings
from bisect import bisect_left, insort
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from msn_dist.sharding import exchange


@dataclass
class TensorBytes:
    """Filled when the measurement ends; a mark that comes again counts once, the last time."""

    changes: list[tuple[int, int]] = field(default_factory=list)  # (ns, bytes), in their order
    marks: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> (ns of its begin, of its end)

    def live(self, name: str) -> int:
        """Bytes where a mark begins."""
        return sum(change for when, change in self.changes if when < self.marks[name][0])

    def peak(self, name: str) -> int:
        """Most bytes at once within a mark."""
        begin, end = self.marks[name]
        now = most = self.live(name)
        for when, change in self.changes:
            if begin <= when <= end:
                now += change
                most = max(most, now)
        return most


@contextmanager
def tensor_bytes() -> Iterator[TensorBytes]:
    """Count from here on, without what lives already; `mark` names stretches of it."""
    found = TensorBytes()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Profiler clears events", UserWarning)  # of several cycles; here is one
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            yield found
    events, waiting = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        events.append(event)
    for event in sorted(events, key=lambda event: event.start_time_ns):
        if event.name.startswith("mark "):
            found.marks[event.name.removeprefix("mark ")] = event.start_time_ns, event.end_time_ns
    allocations = [event for event in events if event.tag == _EventType.Allocation]
    allocations.sort(key=lambda event: event.start_time_ns)
    held = _Held()
    for event in allocations:
        fields = event.extra_fields
        change = held.allocate(fields.ptr, fields.alloc_size) if fields.alloc_size > 0 else held.free(fields.ptr)
        found.changes.append((event.start_time_ns, change))


class _Held:
    """Blocks in use. A thread of the network may free one unseen: an overlapping new block tells that it has."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._sizes: dict[int, int] = {}

    def allocate(self, begin: int, size: int) -> int:
        change, at = size, bisect_left(self._begins, begin + size)
        while at and (last := self._begins[at - 1]) + self._sizes[last] > begin:
            change += self.free(last)
            at -= 1
        insort(self._begins, begin)
        self._sizes[begin] = size
        return change

    def free(self, begin: int) -> int:
        if begin not in self._sizes:
            return 0  # from before the count
        self._begins.pop(bisect_left(self._begins, begin))
        return -self._sizes.pop(begin)


class _Settled:
    """A message that no thread of the network holds once it was waited for: the profiler would not see it freed."""

    def __init__(self, work: dist.Work, received: Tensor, uses: int) -> None:
        self._work, self._received, self._uses = work, received, uses

    def get_future(self) -> torch.futures.Future:
        return self._work.get_future()

    def wait(self) -> None:
        self._work.wait()
        del self._work
        while self._received._use_count() > self._uses:
            pass


def settled_messages() -> Any:
    """Patch for the exchange of memories, so that all of its tensors are freed where they can be counted."""
    start = dist.all_to_all_single

    def all_to_all_single(received: Tensor, *args: Any, **kwargs: Any) -> _Settled:
        uses = received._use_count()
        return _Settled(start(received, *args, **kwargs), received, uses)

    return mock.patch.object(exchange, "dist", SimpleNamespace(all_to_all_single=all_to_all_single))


def mark(name: str) -> record_function:
    return record_function(f"mark {name}")
