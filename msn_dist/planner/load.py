"""The hits of a step as the planner expects them at any W, and what each strategy then sends.

Every rank has m bags of L distinct slots out of n; owners hold n / W rows each.  All follows from how many slots a bag
reads with what probability, `read_B` for `slots_B` slots:

    rows that R ranks hit    U(R) = sum of 1 - (1 - read)^(R m) over the slots, as bags are independent
    owners that a bag hits   E(W) = W (1 - (1 - 1 / W)^L) for large n: where L distinct slots lie does not depend on
                             their popularity; an owner has none of them if each of L draws from n misses its n / W
    pairs                    of a bag and another rank that it hits: m E(W) (W - 1) / W
    hits that leave a rank   m L (W - 1) / W on average over the ranks, and U(1) (W - 1) / W distinct rows, however
                             uneven the owners are: with the same popularity on every rank, one of W asks is at home
    rows that a rank asks    U(1), or in chunks the sum of that of each chunk's bags: every chunk asks for its own rows
    for once

The permuted placement is taken for a random one.  It spreads the slots of one sub-key more evenly than chance, which
shows where an owner has few of them: at N / W = 4 and Zipf 1.2, E(W) is 0.5 % larger, and the busiest owner of rows
asked for once has 1.19 times the mean and not 1.33.

`read` comes from one of three sources.  Uniform: L / n.  Zipf: each sub-key of an axis by Zipf's law, slots by the
product, a bag is the first L distinct of independent draws.  These are the first L slots to ring where slot s rings
after an exponential time of rate p_s; so read = 1 - exp(-p_s t), with t such that the sum of `read` is L (Rosen 1972;
t would be random, and is nearly constant for the tens of hits of a bag).  Measured: L times the share of a run's hits.

Shape suffixes: B bins of slots that are read alike, the most read first, N sub-keys of an axis, W owners, M bags,
L hits a bag, H hot slots, P random placements, X points of a curve.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from msn_dist.config import ValueOptimizerKind
from msn_dist.errors import InputError
from msn_dist.memory.placement import Placement
from msn_dist.planner.usage import hit_curve
from msn_dist.sharding.hit_wire import weight_dtype
from msn_dist.sharding.row_sharded import shard_of
from msn_dist.sharding.wire import row_bytes

_HOT, _PLACEMENTS = 2**12, 64  # slots that are placed one by one, at random, so many times
_HALVINGS = 50  # of the time in which a cache fills
_ALONE, _RATIO = 64, 1.05  # sub-keys with a bin of their own, and the width of the bins after them


@dataclass(frozen=True, eq=False)
class Load:
    """The hits of one rank in one step, as far as bytes, owner load and look-ups depend on them."""

    slots: int  # n
    chunks: tuple[int, ...]  # bags of each chunk of the batch, m in all
    hits: int  # L
    read_B: Tensor  # probability that a bag reads such a slot, float64
    slots_B: Tensor  # int64; slots that are never read may be left out

    @classmethod
    def uniform(cls, slots: int, bags: int, hits: int) -> Load:
        """Every slot alike."""
        _check(slots, hits)
        return cls(slots, (bags,), hits, torch.tensor([hits / slots], dtype=torch.float64), torch.tensor([slots]))

    @classmethod
    def zipf(cls, slots: int, bags: int, hits: int, exponent: float, groups: int = 1) -> Load:
        """Zipf's law on both axes of sub-keys, in each of `groups` parts of the table that as many bags read.

        InputError unless slots = groups * N^2.
        """
        sub_keys = math.isqrt(slots // groups)
        if sub_keys**2 * groups != slots:
            raise InputError(f"slots={slots} is not {groups} times a square, as product keys have N^2 slots; change it")
        _check(sub_keys**2, hits)
        edges_B1 = torch.tensor(_edges(sub_keys))
        count_B = edges_B1.diff()
        share_B = torch.nn.functional.pad(zipf(sub_keys, exponent).cumsum(0), (1, 0))[edges_B1].diff() / count_B
        share_B, order_B = (share_B[:, None] * share_B).flatten().sort(descending=True)
        slots_B = (count_B[:, None] * count_B).flatten()[order_B]
        return cls(slots, (bags,), hits, _first_distinct(share_B, slots_B, hits) / groups, slots_B * groups)

    @classmethod
    def from_usage(cls, slots: int, bags: int, hits: int, usage: Mapping[str, Any]) -> Load:
        """As a run has counted: one layer of its memory_usage.json.

        With other `slots` than the run had, an equal part of the slots has an equal part of the hits.  Slots without a
        hit in the run's last interval count as never read, so U(R) is low: for Zipf 1.05 by 2 % where R m is a
        sixteenth of the bags of that interval, by 7 % at a quarter, and more beyond.  Of a run with row_gather_unique a
        slot has one hit a rank and chunk at most, which hides the skew.  InputError if `usage` is no such thing.
        """
        _check(slots, hits)
        of_slots_X, of_hits_X = hit_curve(usage)
        # points that fall on the same slot of a smaller table become one
        edge_X = (of_slots_X * slots).round().to(torch.int64)
        edge_X[-1] = max(int(edge_X[-1]), hits)  # distinct slots of a bag
        edge_B1, place_X = edge_X.unique(return_inverse=True)
        hits_B1 = torch.zeros(len(edge_B1), dtype=torch.float64).scatter_reduce(0, place_X, of_hits_X, "amax")
        hits_B1[0], slots_B = 0, edge_B1.diff()
        read_B, order_B = (hits * hits_B1.diff() / slots_B).sort(descending=True, stable=True)
        slots_B = slots_B[order_B]  # a curve need not begin with the most used
        return cls(slots, (bags,), hits, _at_most_once(read_B, slots_B, hits), slots_B)

    def in_chunks(self, bags: tuple[int, ...]) -> Load:
        """The same with the batch cut into chunks of so many bags."""
        return replace(self, chunks=bags)

    @property
    def bags(self) -> int:
        """m."""
        return sum(self.chunks)

    @property
    def hottest_share(self) -> float:
        """Share of all hits that the most used slot has."""
        return float(self.read_B[0]) / self.hits

    def owners_of_bag(self, world: int) -> float:
        """E(W)."""
        missed = math.prod(max(0.0, 1 - self.slots / world / (self.slots - drawn)) for drawn in range(self.hits))
        return world * (1 - missed)

    def rows(self, ranks: int) -> float:
        """U(R)."""
        return self._rows_of(ranks * self.bags)

    def rows_by_chunk(self, ranks: int) -> float:
        """The same of each chunk for itself, added up."""
        return sum(times * self._rows_of(ranks * bags) for bags, times in Counter(self.chunks).items())

    def missed_rows(self, ranks: int, places: int) -> float:
        """Of the rows that so many ranks hit in a step, those that a cache of the last so many does not have.

        sum of p (1 - p)^T, with T such that the sum of 1 - (1 - p)^T is `places` (`host_tier`); 0 if there is a place
        for every row that is ever hit.
        """
        return _missed_rows(self, ranks, places)

    def owner_load(self, world: int, once: bool = False) -> float:
        """Hits on the busiest owner over the mean; `once`: of the rows that ranks ask for, each once a chunk.

        The mean over random placements of the maximum over owners.  The hottest slots are placed one by one; the sum
        of all others on an owner, and how the hits of a step differ from what is expected, are normal.  Deviations
        from the mean slot are what is placed, as every owner has as many slots.
        """
        return _owner_load(self, world, once)

    def _rows_of(self, bags: int) -> float:
        return _rows(self, bags)

    def _read_in(self, bags: int) -> Tensor:
        """Probability that any of so many bags reads a slot [B]."""
        return -torch.expm1(bags * torch.log1p(-self.read_B))


@dataclass(frozen=True, eq=False)
class CountedLoad(Load):
    """The bags of several ranks as they are: E(W), and U(R) for so many ranks only, are counted."""

    row_ML: Tensor

    @classmethod
    def of(cls, slots: int, slots_ML: Tensor, bags: int) -> CountedLoad:
        """`bags` of them are a rank's."""
        row_ML = Placement.permuted(slots).row_of(slots_ML.to(torch.int64))
        hits_B = row_ML.unique(return_counts=True)[1].sort(descending=True).values
        return cls(slots, (bags,), row_ML.shape[1], hits_B.double() / len(row_ML), torch.ones_like(hits_B), row_ML)

    def owners_of_bag(self, world: int) -> float:
        ordered_ML = (self.row_ML // shard_of(self.slots, world, 0)[0]).sort(dim=1).values
        return 1 + float((ordered_ML.diff(dim=1) != 0).sum()) / len(ordered_ML)

    def _rows_of(self, bags: int) -> float:
        parts = self.row_ML[: len(self.row_ML) // bags * bags].split(bags)
        return sum(len(part.unique()) for part in parts) / len(parts)


@dataclass(frozen=True)
class Message:
    """One all-to-all: the bytes that a rank sends to others, the mean over the ranks."""

    direction: str  # "forward" or "backward"
    name: str  # as the exchange counts it
    bytes_inside: float  # to ranks of its node
    bytes_between: float  # to ranks of other nodes
    busiest: float = 1.0  # bytes of the rank that sends or receives most, over the mean
    once: bool = False  # a step, and not with every chunk of the batch


def expected_bytes(
    strategy: str,
    world: int,
    ranks_per_node: int,
    load: Load,
    dim: int,
    wire: str = "fp32",
    optimizer: ValueOptimizerKind = "rowwise_adagrad",
    group_ranks: int | None = None,
) -> list[Message]:
    """The messages of a forward and backward in the order of time, without empty ones; none at W = 1.

    The formulas stand in the docstrings of the strategies (msn_dist/sharding) and, for any deal of hits, in
    planner/traffic.py.  `group_ranks`: of two_level's groups, a divisor or a multiple of a node; None: a node.
    InputError if the ranks are not whole nodes and groups, or one would hold no rows or columns.
    """
    if world % ranks_per_node:
        raise InputError(f"{world} ranks are not a multiple of the {ranks_per_node} of a node; start as many on each")
    block, *_ = shard_of(load.slots, world, 0)
    if world == 1:
        return []
    others, away, m, chunks = world - 1, (world - 1) / world, load.bags, len(load.chunks)
    in_node = (ranks_per_node - 1) / others  # share of the other ranks
    messages: list[Message] = []

    def send(
        direction: str, name: str, size: float, busiest: float = 1.0, inside: float = in_node, once: bool = False
    ) -> None:
        if size:
            messages.append(Message(direction, name, size * inside, size * (1 - inside), busiest, once))

    row, weight, value = 4 if block < 2**31 else 8, weight_dtype(wire).itemsize, row_bytes(wire, dim)
    hits_away = m * load.hits * away
    match strategy:
        case "row_pooled" | "row_pooled_sparse" | "two_level":
            skew = load.owner_load(world)
            send("forward", "counts", 16 * others * chunks)
            if strategy != "row_pooled_sparse":
                send("forward", "lengths", others * m * (1 if load.hits < 256 else 4))
            send("forward", "hits", hits_away * (row + weight), skew)
            if strategy == "row_pooled":
                send("forward", "pooled", others * m * value)
                send("backward", "pooled_gradient", others * m * value)
            elif strategy == "row_pooled_sparse":
                owners = load.owners_of_bag(world)
                most = min(skew, world / owners)  # an owner that every bag hits
                send("forward", "pooled", m * owners * away * value, most)
                send("backward", "pooled_gradient", m * owners * away * value, most)
            else:
                size = ranks_per_node if group_ranks is None else group_ranks
                in_group, across = _shares_in_node(world, ranks_per_node, size)
                at_home, abroad = (size - 1) * (world // size) * m * value, (world // size - 1) * m * value
                send("forward", "pooled_in_group", at_home, inside=in_group)
                send("forward", "pooled", abroad, inside=across)
                send("backward", "pooled_gradient", abroad, inside=across)
                send("backward", "pooled_in_group_gradient", at_home, inside=in_group)
            send("backward", "hits_gradient", hits_away * 4, skew)
        case "row_gather" | "row_gather_unique":
            unique = strategy == "row_gather_unique"
            asked = load.rows_by_chunk(1) * away if unique else hits_away
            skew = load.owner_load(world, once=unique)
            send("forward", "counts", 8 * others * chunks)
            send("forward", "rows", asked * row, skew)
            send("forward", "values", asked * value, skew)
            send("backward", "values_gradient", asked * value, skew)
        case "column":
            columns = -(-dim // world)
            if columns * others >= dim:
                raise InputError(f"column: values of width {dim} leave a rank of {world} without columns")
            row, value = 4 if load.slots < 2**31 else 8, row_bytes(wire, columns)
            squares = 0 if optimizer == "sgd" else load.rows(world) * away * 4
            send("forward", "counts", 8 * others * chunks)
            send("forward", "hits", others * m * load.hits * (row + weight))
            send("forward", "pooled", others * m * value)
            send("backward", "pooled_gradient", others * m * value)
            send("backward", "squares", squares, once=True)  # of a rank's columns to who adds them up,
            send("backward", "squares", squares, once=True)  # and the sums back
            send("backward", "hits_gradient", others * m * load.hits * 4)
        case "replicated":
            send("backward", "table_gradient", load.slots * away * value, once=True)
            if optimizer == "rowwise_adam":
                send("backward", "rows_hit", load.slots * away, once=True)
            send("backward", "table", load.slots * away * 4 * dim, once=True)
        case _:
            raise ValueError(f"unknown strategy {strategy!r}")
    return messages


def expected_distinct(rows: int, hits: float) -> float:
    """Of R rows, those that so many hits fall on, each on any of them: R (1 - (1 - 1 / R)^hits)."""
    return -rows * math.expm1(hits * math.log1p(-1 / rows)) if rows > 1 else 1.0


def _shares_in_node(world: int, ranks_per_node: int, group_ranks: int) -> tuple[float, float]:
    """Of the other ranks of a group, and of those with the same place in other groups; groups are consecutive ranks.

    InputError if groups are not equal, or neither whole nodes nor parts of one.
    """
    if world % group_ranks or (ranks_per_node % group_ranks and group_ranks % ranks_per_node):
        raise InputError(
            f"memory.group_ranks={group_ranks}: {world} ranks in nodes of {ranks_per_node} are planned in groups that "
            "are equal, and parts of a node or several nodes; set it to such a number, or leave it out"
        )
    in_group = (min(group_ranks, ranks_per_node) - 1) / max(1, group_ranks - 1)
    across = (max(1, ranks_per_node // group_ranks) - 1) / max(1, world // group_ranks - 1)
    return in_group, across


def zipf(count: int, exponent: float) -> Tensor:
    """Shares of `count` things in the order of popularity, float64."""
    shares = torch.arange(1, count + 1, dtype=torch.float64) ** -exponent
    return shares / shares.sum()


@lru_cache(maxsize=256)
def _rows(load: Load, bags: int) -> float:
    return float((load.slots_B * load._read_in(bags)).sum())


@lru_cache(maxsize=64)
def _missed_rows(load: Load, ranks: int, places: int) -> float:
    if places >= int(load.slots_B[load.read_B > 0].sum()):
        return 0.0
    rate_B = -ranks * load.bags * torch.log1p(-load.read_B)  # (1 - p)^T = e^(-rate T)
    shortest, longest = 0.0, 1.0

    def cached(time: float) -> float:
        return float((load.slots_B * -torch.expm1(-rate_B * time)).sum())

    while cached(longest) < places:
        shortest, longest = longest, 2 * longest
    for _ in range(_HALVINGS):
        time = (shortest + longest) / 2
        shortest, longest = (time, longest) if cached(time) < places else (shortest, time)
    return float((load.slots_B * -torch.expm1(-rate_B) * torch.exp(-rate_B * longest)).sum())


@lru_cache(maxsize=32)
def _owner_load(load: Load, world: int, once: bool) -> float:
    if world == 1:
        return 1.0
    # a slot is asked for once a chunk that reads it, or once a bag
    reads = [(times, load._read_in(bags)) for bags, times in (Counter(load.chunks) if once else {1: load.bags}).items()]
    asks_B = sum(times * read_B for times, read_B in reads)  # of a rank
    varying_B = sum(times * read_B * (1 - read_B) for times, read_B in reads)
    mean = float((load.slots_B * asks_B).sum())
    deviation_B = (asks_B * world - mean * world / load.slots) / mean  # of a slot, where the mean owner has 1
    hot_B = load.slots_B.cumsum(0) <= _HOT
    hot_H = deviation_B[hot_B].repeat_interleave(load.slots_B[hot_B])
    unread = load.slots - int(load.slots_B.sum())
    squares = float((load.slots_B * deviation_B**2)[~hot_B].sum()) + unread * (world / load.slots) ** 2
    variance = squares / world * (1 - 1 / world) + float((load.slots_B * varying_B).sum()) / mean**2
    generator = torch.Generator().manual_seed(0)
    load_PW = torch.randn(_PLACEMENTS, world, dtype=torch.float64, generator=generator) * variance**0.5
    owner_PH = torch.randint(world, (_PLACEMENTS, len(hot_H)), generator=generator)
    load_PW.scatter_add_(1, owner_PH, hot_H.expand(_PLACEMENTS, -1))
    # all deviations add up to 0, so those of the others to what the hottest have too much
    return max(1.0, 1 - float(hot_H.sum()) / world + float(load_PW.amax(1).mean()))


def _edges(count: int) -> list[int]:
    """Of bins over `count` things in the order of popularity: the first alone, then each bin a little wider."""
    edges = list(range(min(count, _ALONE) + 1))
    while edges[-1] < count:
        edges.append(min(count, int(edges[-1] * _RATIO) + 1))
    return edges


def _first_distinct(share_B: Tensor, slots_B: Tensor, hits: int) -> Tensor:
    """Probability that a slot is among the first `hits` distinct ones of independent draws [B]."""
    time = float(hits)
    for _ in range(100):  # Newton's steps on a concave function come from below
        missing = hits - float((slots_B * -torch.expm1(-share_B * time)).sum())
        if missing < 1e-9 * hits:
            break
        time += missing / float((slots_B * share_B * torch.exp(-share_B * time)).sum())
    return -torch.expm1(-share_B * time)


def _at_most_once(read_B: Tensor, slots_B: Tensor, hits: int) -> Tensor:
    """A bag has a slot once: what popular ones have beyond that is spread over the others in proportion [B]."""
    while True:
        read_B = read_B.clamp(max=1)
        missing, others_B = hits - float((slots_B * read_B).sum()), read_B < 1
        of_others = float((slots_B * read_B)[others_B].sum())
        if missing < 1e-9 * hits or not of_others:
            return read_B
        read_B = torch.where(others_B, read_B * (1 + missing / of_others), read_B)


def _check(slots: int, hits: int) -> None:
    if hits > slots:
        raise InputError(f"a bag cannot read hits={hits} distinct slots of {slots}; lower memory.top_k")
