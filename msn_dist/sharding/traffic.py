"""Bytes that a rank has sent to its peers: by direction, by what they carried, by peer."""

from __future__ import annotations

from collections.abc import Sequence

HEADERS = ("counts", "lengths")  # what a receiver must know before, or beside, the data


class Traffic:
    """Counts every message of one memory; what a rank keeps for itself is free."""

    def __init__(self, world: int) -> None:
        self._sent: dict[tuple[str, str], list[int]] = {}
        self._world = world

    def add(self, direction: str, name: str, bytes_W: Sequence[int]) -> None:
        """Count a message of "forward" or "backward" with so many bytes for each rank."""
        sent_W = self._sent.setdefault((direction, name), [0] * self._world)
        for peer, count in enumerate(bytes_W):
            sent_W[peer] += count

    def by_message(self) -> dict[str, dict[str, int]]:
        """{direction: {name: bytes}}, without messages that sent nothing."""
        tree: dict[str, dict[str, int]] = {}
        for (direction, name), sent_W in self._sent.items():
            if total := sum(sent_W):
                tree.setdefault(direction, {})[name] = total
        return tree

    def by_peer(self) -> list[int]:
        """Bytes sent to each rank of the group."""
        return [sum(column) for column in zip(*self._sent.values(), strict=True)] or [0] * self._world

    def total(self) -> int:
        return sum(self.by_peer())
