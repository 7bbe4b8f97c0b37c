"""Sweeps the sizes of a memory and of the machine, and keeps what nothing else beats.

A candidate is beaten by one that has as many memory parameters (n D_v) and as large a k, and takes no more of the
ranks' time for a row, within 2 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from rich.table import Table

from msn_dist.errors import InputError
from msn_dist.planner.dense_trace import StepTrace
from msn_dist.planner.id_placement import IdPlan
from msn_dist.planner.id_tables import NoRoom
from msn_dist.planner.search import Priced, Search, value_dtypes
from msn_dist.planner.situation import Situation

_GIB, _SAME = 2**30, 1.02
_SCALES = {"sub_keys": (1, 2, 4), "top_k": (0.5, 1, 2), "value_dim": (0.5, 1), "rows": (0.5, 1, 2), "nodes": (1, 2)}


@dataclass(frozen=True)
class Tuned:
    """One candidate, in its fastest layout that fits."""

    situation: Situation
    priced: Priced

    @property
    def parameters(self) -> int:
        """Of one memory: n D_v."""
        return self.situation.slots * self.situation.dim

    @property
    def overrides(self) -> list[str]:
        """Of the config it was made from; its nodes are the topology's."""
        memory = self.situation.memory
        return [
            f"memory.sub_keys={memory.sub_keys}",
            f"memory.top_k={memory.top_k}",
            f"memory.value_dim={self.situation.dim}",
            f"memory.value_dtype={memory.value_dtype}",
            f"data.batch_size={self.situation.config.data.batch_size}",
        ]

    @property
    def rank_seconds(self) -> float:
        """Time of all ranks for a row."""
        return self.priced.time.seconds * self.situation.topology.world / self.situation.config.data.batch_size

    def beats(self, other: Tuned) -> bool:
        sizes, theirs = ((one.parameters, one.situation.memory.top_k) for one in (self, other))
        if any(mine < size for mine, size in zip(sizes, theirs, strict=True)):
            return False
        if sizes == theirs:  # of equals the one on fewer ranks
            (mine, here), (their, there) = ((one.rank_seconds, one.situation.topology.world) for one in (self, other))
            return (mine, here) < (their, there)
        return self.rank_seconds < _SAME * other.rank_seconds


def tune(situation: Situation, most_seconds: float | None, rounding: bool, say: Callable[[str], None]) -> list[Tuned]:
    """The Pareto set of what fits, the largest memory first; values of 16 bits only with `rounding`.

    InputError without a memory, or if no candidate is possible.
    """
    if situation.memory is None:
        raise InputError("--tune sweeps the sizes of a memory, and this config has none; add a memory section")
    traces: dict[str, StepTrace] = {}
    placed: dict[tuple[int, int], IdPlan] = {}
    found, priced_any, refused = [], False, None
    for number, candidate in enumerate(_candidates(situation, rounding), 1):
        say(f"candidate {number}, {len(found)} fit")
        if candidate.least_table_bytes() > candidate.topology.device_bytes:
            continue
        where = (candidate.topology.world, candidate.rows)
        try:
            search = Search(candidate, traces, placed.get(where), rounding="left out")
            priced = search.fastest()
        except (NoRoom, InputError) as error:
            refused = error
            continue
        priced_any = True
        if search.ids.tables:  # not the one of a search in which nothing fits
            placed[where] = search.ids
        if priced is not None and (most_seconds is None or priced.time.seconds <= most_seconds):
            found.append(Tuned(candidate, priced))
    if not priced_any and isinstance(refused, InputError):
        raise refused
    best = [one for one in found if not any(other.beats(one) for other in found)]
    return sorted(best, key=lambda one: (-one.parameters, one.rank_seconds))


def tuned_table(found: list[Tuned]) -> Table:
    """80 columns; microseconds of a rank."""
    table = Table(title="what nothing else beats", title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("sub_keys", "k", "D_v", "values", "ranks", "rows/rank", "strategy", "ms", "us/row", "GiB"):
        table.add_column(name, justify="left" if name == "strategy" else "right", no_wrap=True)
    for one in found:
        here, memory, priced = one.situation, one.situation.memory, one.priced
        table.add_row(
            str(memory.sub_keys),
            str(memory.top_k),
            str(here.dim),
            priced.layout.value_dtype + (" host" if priced.layout.tier == "host" else ""),
            str(here.topology.world),
            str(here.rows),
            priced.layout.strategy,
            f"{1e3 * priced.time.seconds:.3g}",
            f"{1e6 * one.rank_seconds:.3g}",
            f"{priced.fullest / _GIB:.3g}",
        )
    return table


def _candidates(situation: Situation, rounding: bool) -> Iterator[Situation]:
    memory, topology = situation.memory, situation.topology
    dtypes = value_dtypes(memory) if rounding else (memory.value_dtype,)
    nodes = _SCALES["nodes"] if topology.between_nodes is not None else (1,)
    scales = [_SCALES[name] for name in ("sub_keys", "top_k", "value_dim", "rows")]
    for sub_keys, top_k, width, rows, more, dtype in product(*scales, nodes, dtypes):
        dim, hits = int(situation.dim * width), int(memory.top_k * top_k)
        larger = topology.model_copy(update={"nodes": topology.nodes * more})
        batch = int(situation.rows * rows) * larger.world
        if dim % 4 or not dim or not hits or batch < larger.world or hits > memory.sub_keys * sub_keys:
            continue
        sizes = {"sub_keys": memory.sub_keys * sub_keys, "top_k": hits, "value_dim": dim, "value_dtype": dtype}
        config = situation.config.model_copy(
            update={
                "memory": memory.model_copy(update=sizes),
                "data": situation.config.data.model_copy(update={"batch_size": batch}),
            }
        )
        try:
            candidate = replace(situation, config=config, topology=larger)
        except InputError:  # training would refuse it
            continue
        yield candidate
