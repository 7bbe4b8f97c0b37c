"""A step of the exchange on any number of ranks, without a process: exact from its hits, or expected from a load.

Shape suffixes: W ranks, WW from a rank (first) to an owner (second).
"""

from __future__ import annotations

from dataclasses import dataclass

from msn_dist.planner.layout import Layout
from msn_dist.planner.load import Load, Message, expected_bytes
from msn_dist.planner.traffic import Demand, bytes_of_step


@dataclass(frozen=True)
class ExactStep:
    """What the exchange of one memory counts in one step."""

    sent_W: list[dict[str, dict[str, int]]]  # {direction: {message: bytes}} that each rank sends to others
    owner_load: float  # hits that the busiest rank looks up, over the mean

    @property
    def bytes_W(self) -> list[int]:
        return [sum(sum(messages.values()) for messages in sent.values()) for sent in self.sent_W]


@dataclass(frozen=True)
class ExpectedStep:
    """What a rank is expected to send for one memory in one step, the mean over the ranks."""

    messages: list[Message]
    owner_load: float  # as of ExactStep

    @property
    def bytes_sent(self) -> float:
        return sum(message.bytes_inside + message.bytes_between for message in self.messages)

    @property
    def bytes_between(self) -> float:
        """The part that goes to other nodes."""
        return sum(message.bytes_between for message in self.messages)


def simulate_hits(layout: Layout, demand: Demand, dim: int) -> ExactStep:
    """The step of these hits: ``Demand.of(slots_W, Placement.permuted(n))``; `layout` is for as many ranks."""
    hits_of_rank_W = {
        "row_gather_unique": demand.distinct_WW.sum(0),
        "column": demand.hits_WW.sum().expand(layout.world),  # every rank looks up every hit
        "replicated": demand.bags_W,
    }.get(layout.strategy, demand.hits_WW.sum(0))
    mean = float(hits_of_rank_W.double().mean())
    load = float(hits_of_rank_W.max()) / mean if mean else 1.0
    sent_W = bytes_of_step(layout.strategy, demand, dim, layout.wire, layout.ranks_of_group, layout.optimizer)
    return ExactStep(sent_W, load)


def simulate(layout: Layout, load: Load, dim: int) -> ExpectedStep:
    """The expected step if every rank has this load; InputError if the strategy cannot serve so many ranks."""
    even = layout.world == 1 or layout.strategy in ("column", "replicated")
    owner_load = 1.0 if even else load.owner_load(layout.world, once=layout.strategy == "row_gather_unique")
    ranks, rest = (layout.world, layout.ranks_per_node), (layout.wire, layout.optimizer, layout.group_ranks)
    return ExpectedStep(expected_bytes(layout.strategy, *ranks, load, dim, *rest), owner_load)
