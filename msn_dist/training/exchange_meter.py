"""What the memories' exchange sends while a model trains, and how much of it hides behind computing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist

from msn_dist.sharding import ShardedMemoryValues
from msn_dist.sharding.traffic import HEADERS
from msn_dist.training.ranks import Ranks


class ExchangeMeter:
    """Runs between `start` and `stop`, as the stopwatch does: evaluations are left out."""

    def __init__(self, memories: Mapping[str, ShardedMemoryValues], ranks: Ranks) -> None:
        self._exchanges = [values.exchange for values in memories.values()]
        self._ranks = ranks
        self._totals = torch.zeros(3, dtype=torch.float64)  # bytes, seconds under way, seconds waited for
        self._bytes_at_start: int | None = None

    def start(self) -> None:
        for exchange in self._exchanges:
            exchange.overlap.read()  # of an evaluation
        self._bytes_at_start = self._bytes()

    def stop(self) -> None:
        self._collect()
        self._bytes_at_start = None

    def read(self, steps: int) -> dict[str, float]:
        """Since the last reading, over all ranks; a collective call. Empty without messages.

        bytes_per_step: all memories of all ranks; hidden_share: of the time that messages were under way, what nobody
        waited for.
        """
        if self._bytes_at_start is not None:
            self._collect()
        totals, self._totals = self._totals, torch.zeros_like(self._totals)
        dist.all_reduce(totals, group=self._ranks.control)
        sent, under_way, waited = totals.tolist()
        if not under_way:
            return {}
        return {"bytes_per_step": sent / steps, "hidden_share": 1 - waited / under_way}

    def _collect(self) -> None:
        now = self._bytes()
        self._totals += torch.tensor([now - self._bytes_at_start, 0, 0])
        for exchange in self._exchanges:
            self._totals[1:] += torch.tensor(exchange.overlap.read())
        self._bytes_at_start = now

    def _bytes(self) -> int:
        return sum(exchange.traffic.total() for exchange in self._exchanges)

    def whole_run(self) -> dict[str, object]:
        """For the summary, evaluations included; a collective call.

        bytes_sent: {direction: {message: bytes}} over all memories and ranks, of which header_bytes are counts and
        lengths; bytes_between_ranks: a row for each sender.
        """
        mine: Counter = Counter()
        for exchange in self._exchanges:
            for direction, messages in exchange.traffic.by_message().items():
                mine.update({(direction, name): count for name, count in messages.items()})
        by_peer = [exchange.traffic.by_peer() for exchange in self._exchanges] or [[0] * self._ranks.world]
        parts: list[tuple[Counter, list[int]] | None] = [None] * self._ranks.world
        dist.all_gather_object(
            parts, (mine, [sum(column) for column in zip(*by_peer, strict=True)]), self._ranks.control
        )
        sent: dict[str, dict[str, int]] = {"forward": {}, "backward": {}}
        for (direction, name), count in sum((counter for counter, _ in parts), Counter()).items():
            sent[direction][name] = count
        return {
            "bytes_sent": sent,
            "header_bytes": sum(sent["forward"].get(name, 0) for name in HEADERS),
            "bytes_between_ranks": [peers for _, peers in parts],
        }
