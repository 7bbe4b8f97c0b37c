"""The flight record: the last memory exchanges of a process group, told when a peer is lost.

A rank knows by itself which of its exchanges did not arrive, but not who is missing.  So every rank that fails posts
where it stands in the rendezvous store, waits a moment for the posts of the others, and names those who did not post.
A rank that fails by an error of its own posts that, so that the others need not wait.

Shape suffixes: W ranks of the group.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch.distributed as dist

from msn_dist.errors import PeerLost

GRACE = 3.0  # seconds that ranks which failed wait for the posts of the others
_KEPT = 32  # on a GPU the host may be many exchanges ahead of the one that is stuck
_TOLD = 4  # other exchanges, and ranks that are behind, in a message
_LISTED = 8  # peers whose bytes are told one by one


def of(group: dist.ProcessGroup) -> FlightRecord:
    """The record of a group: one for all memories of this process."""
    if group not in _records:
        ranks = dist.get_process_group_ranks(group)
        _records[group] = FlightRecord(dist.get_rank(), ranks, group.get_group_store(), _timeout(group))
    return _records[group]


_records: WeakKeyDictionary[dist.ProcessGroup, FlightRecord] = WeakKeyDictionary()


@dataclass(slots=True)
class _Exchange:
    sequence: int
    name: str
    send_bytes_W: Sequence[int]
    receive_bytes_W: Sequence[int]
    departure: float
    arrived: bool = False
    completed: Callable[[], bool] | None = None

    def __str__(self) -> str:
        return f"exchange {self.sequence} ({self.name})"

    def in_flight(self) -> bool:
        if self.completed is None:
            return not self.arrived
        try:
            return not self.completed()
        except RuntimeError:  # of a device that has failed
            return True


class _Post(NamedTuple):
    """What a rank that fails tells the others."""

    rank: int
    position: float  # 57 in exchange 57, 57.5 after it
    place: str
    waited: float  # seconds
    error: str | None = None  # its own, not that of a collective


class FlightRecord:
    """The last exchanges of one process group, as this rank saw them.

    Args:
        rank: of this process.
        ranks: of the group, in its order; all ranks are those of the default group.
        store: where the ranks of the group find each other's posts.
        timeout: seconds after which the group gives a collective up, None if unknown.
    """

    def __init__(self, rank: int, ranks: list[int], store: dist.Store, timeout: float | None = None) -> None:
        self.rank, self.ranks = rank, ranks
        self.speaking = False  # a message is being made
        self._store, self._timeout = store, timeout
        self._exchanges: deque[_Exchange] = deque(maxlen=_KEPT)
        self._sequence = 0
        self._posted = False
        self._last_event = time.monotonic()

    def departed(self, name: str, send_bytes_W: Sequence[int], receive_bytes_W: Sequence[int]) -> int:
        """Note that an exchange is about to start; returns its sequence number, the same on every rank."""
        self._sequence += 1
        self._last_event = now = time.monotonic()
        self._exchanges.append(_Exchange(self._sequence, name, send_bytes_W, receive_bytes_W, now))
        return self._sequence

    def arrived(self, sequence: int, completed: Callable[[], bool] | None = None) -> None:
        """Note that waiting for an exchange is over.

        On a GPU the host does not wait: `completed` then tells whether the exchange has really arrived.  It may be
        called from another thread, and should not keep the exchanged tensors alive (a CUDA event's `query` is good).
        """
        self._last_event = time.monotonic()
        back = self._sequence - sequence
        if back < len(self._exchanges):
            exchange = self._exchanges[-1 - back]
            exchange.arrived, exchange.completed = True, completed

    def lost(self, error: Exception) -> PeerLost:
        """What to raise for a collective's error; takes up to three times GRACE, and hangs in no case.

        Raises `error` itself if no peer has caused it, and tells the others.
        """
        if isinstance(error, PeerLost):
            raise error
        if not _is_of_a_peer(error):
            words = f"{type(error).__name__}: {error}"
            self._bounded(self._post, self._standing()[1]._replace(error=_first_line(words)))
            raise error
        return self.account(_reason(error))

    def account(self, reason: str) -> PeerLost:
        """Exchange posts with the other ranks that failed; the error that says what is known."""
        failed, own = self._standing()
        self.speaking, self._last_event = True, time.monotonic()
        if failed:
            where = f"{own.place}, {own.waited:.1f} s after its start"
        else:
            what = f"{self._exchanges[-1]} had arrived" if self._exchanges else "joining, before its first exchange"
            where = f"in another collective, {own.waited:.1f} s after {what}"
        limit = f" (timeout {self._timeout:g} s)" if self._timeout else ""
        answer: list[dict[int, _Post]] = []
        self._bounded(self._ask, own, answer)
        posts = answer[0] if answer else None
        missing = [rank for rank in self.ranks if rank not in posts] if posts else []

        lines = [
            f"rank {self.rank} lost a peer {where}{limit}",
            f"reason: {reason}",
            f"missing: {_who(posts, missing, failed)}",
        ]
        if behind := [post for post in (posts or {}).values() if post.position < own.position and not post.error]:
            lines.append(f"behind: {_shortened([f'rank {post.rank} failed {post.place}' for post in behind])}")
        if failed:
            sent = self._bytes(failed.send_bytes_W, "to", missing)
            expected = self._bytes(failed.receive_bytes_W, "from", missing)
            lines.append(f"bytes sent: {sent}; expected: {expected}")
        others = [exchange for exchange in tuple(self._exchanges) if exchange is not failed][-_TOLD:]
        for state, in_flight in (("arrived", False), ("also in flight", True)):
            if some := [f"{one.sequence} ({one.name})" for one in others if one.in_flight() == in_flight]:
                lines.append(f"{state}: {', '.join(some)}")
        return PeerLost("\n  ".join(lines))

    def idle(self) -> float:
        """Seconds since an exchange departed, arrived or was found to have failed."""
        return time.monotonic() - self._last_event

    def is_overdue(self) -> bool:
        """Whether an exchange that the host does not wait for will soon be given up by the group."""
        if self._timeout is None:
            return False
        # early enough to speak before NCCL's watchdog ends the process
        oldest = time.monotonic() - max(self._timeout - 3 * GRACE, self._timeout / 2)
        return any(one.completed and one.departure < oldest and one.in_flight() for one in tuple(self._exchanges))

    def _standing(self) -> tuple[_Exchange | None, _Post]:
        """The oldest exchange in flight, if there is one, and what to tell the others."""
        now, exchanges = time.monotonic(), tuple(self._exchanges)
        for exchange in exchanges:
            if exchange.in_flight():
                return exchange, _Post(self.rank, exchange.sequence, f"in {exchange}", now - exchange.departure)
        place = f"after {exchanges[-1]}" if exchanges else "before its first exchange"
        return None, _Post(self.rank, self._sequence + 0.5, place, now - self._last_event)

    @staticmethod
    def _bounded(call: Callable[..., object], *arguments: object) -> None:
        """Call the store as far as it answers; in a thread, as one whose host is stopped may hang for ever."""

        def attempt() -> None:
            with suppress(RuntimeError):  # of a store that has gone
                call(*arguments)

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(3 * GRACE)

    def _post(self, own: _Post) -> None:
        """Once; posts are numbered as they come."""
        if not self._posted:
            self._posted = True
            self._store.set(f"lost/{self._store.add('lost', 1)}", json.dumps(own))

    def _ask(self, own: _Post, answer: list[dict[int, _Post]]) -> None:
        """Post, and append the posts of all by rank; append nothing if the store does not answer."""
        self._post(own)
        count = self._wait_for("lost", len(self.ranks))
        posts = [_Post(*json.loads(post)) for post in self._store.multi_get([f"lost/{i + 1}" for i in range(count)])]
        answer.append({post.rank: post for post in posts})
        self._store.add("read", 1)
        if self.rank == 0:  # the store may be in this process: the others shall read before it ends
            self._wait_for("read", sum(not post.error for post in posts))

    def _wait_for(self, counter: str, count: int) -> int:
        """The counter, when it has come to `count` or GRACE is over."""
        deadline = time.monotonic() + GRACE
        while (now := self._store.add(counter, 0)) < count and time.monotonic() < deadline:
            time.sleep(0.05)
        return now

    def _bytes(self, bytes_W: Sequence[int], word: str, missing: list[int]) -> str:
        bytes_by_rank = {rank: count for rank, count in zip(self.ranks, bytes_W, strict=True) if rank != self.rank}
        few = len(bytes_by_rank) <= _LISTED
        each = [f"{bytes_by_rank[rank]:,} {word} rank {rank}" for rank in (bytes_by_rank if few else missing)]
        if few:
            return ", ".join(each)
        total = f"{sum(bytes_by_rank.values()):,} {word} {len(bytes_by_rank)} ranks"
        return f"{total}, of these {_shortened(each)}" if each else total


def _who(posts: dict[int, _Post] | None, missing: list[int], failed: _Exchange | None) -> str:
    """Who is missing, in words."""
    if posts is None:
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        holder = f"torchrun on {os.environ.get('MASTER_ADDR')}" if agent else "rank 0"
        return f"unknown, as the rendezvous store does not answer; {holder} holds it and is most likely gone itself"
    who = [f"rank {post.rank} ended by its own error, {post.error}" for post in posts.values() if post.error]
    if missing:
        where = f"exchange {failed.sequence}" if failed else "this collective"
        who.append(f"{_ranks(missing)} {'is' if len(missing) == 1 else 'are'} gone, or did not come to {where}")
    if not who:
        last = min(posts.values(), key=lambda post: post.waited)
        who.append(f"nobody; rank {last.rank} came last and waited {last.waited:.1f} s")
    return _shortened(who)


def _is_of_a_peer(error: Exception) -> bool:
    if isinstance(error, dist.DistError):
        return "ncclInvalid" not in str(error)  # NCCL's words for wrong use
    return _GLOO.match(str(error)) is not None or _GLOO_GAVE_UP in str(error)


def _reason(error: Exception) -> str:
    """The library's message without what it always says."""
    return _first_line(_GLOO.sub("", str(error))).split(". This is typically caused by")[0]


def _first_line(text: str) -> str:
    return text.partition("\n")[0][:200]


# What gloo puts before the failure of a connection ([.../gloo/transport/tcp/pair.cc:553] Connection closed by peer),
# but not before that of a check (it begins with "[enforce fail at").
_GLOO = re.compile(r"\[\S*gloo/transport/\S+\] ")
_GLOO_GAVE_UP = "Application timeout caused pair closure"  # without that, where another thread has waited too long


def _timeout(group: dist.ProcessGroup) -> float | None:
    with suppress(AttributeError, IndexError, RuntimeError):  # torch has no public way to ask
        return group._get_backend(group._device_types[0]).options._timeout.total_seconds()
    return None


def _ranks(ranks: list[int]) -> str:
    """[1, 4, 5, 6] -> 'ranks 1, 4-6'."""
    starts = [ranks[0], *(after for before, after in pairwise(ranks) if after != before + 1)]
    ends = [*(before for before, after in pairwise(ranks) if after != before + 1), ranks[-1]]
    spans = [f"{start}-{end}" if end > start else f"{start}" for start, end in zip(starts, ends, strict=True)]
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(spans)}"


def _shortened(parts: list[str]) -> str:
    more = len(parts) - _TOLD
    return ", ".join(parts[:_TOLD]) + (f" and {more} more" if more > 0 else "")
