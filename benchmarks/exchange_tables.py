"""The rows of benchmarks.exchange: what follows from the measured ones, and all of them as text.

A row holds one measurement in long format: quantiles over steps (time), over ranks (bytes), or one number three times.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.exchange_counts import CAPACITY, STEPS, Fullness, padding_bytes
from benchmarks.exchange_model import COMPARED, WORLDS, clear_crossing, crossing
from benchmarks.exchange_slots import SLOTS
from msn_dist.planner.layout import Layout
from msn_dist.planner.load import CountedLoad, Load
from msn_dist.planner.simulate import simulate

KINDS = ("headers", "forward", "backward")
CORES = len(os.sched_getaffinity(0))
_QUANTILES = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
_PADDED = ("row_pooled", "row_gather")
_SHAPE = ("skew", "hits", "dim", "bags", "n")

Row = dict[str, Any]
Slots = Mapping[tuple[str, int], Tensor]  # slots_ML of all ranks, by skew and L


def row(benchmark: str, metric: str, unit: str, values: Sequence[float], **where: Any) -> Row:
    """A line of the CSV."""
    if len(values) == 1:  # which may be infinite
        p20 = p50 = p80 = values[0]
    else:
        p20, p50, p80 = torch.tensor(values, dtype=torch.float64).quantile(_QUANTILES).tolist()
    nowhere = dict.fromkeys((*_SHAPE, "ranks", "strategy", "wire"), "")
    measured = {"metric": metric, "unit": unit, "p20": p20, "p50": p50, "p80": p80}
    return {"benchmark": benchmark, **nowhere, "cores": CORES, **where, **measured}


def crossovers(rows: Sequence[Row], slots: Slots) -> list[Row]:
    """W from which on the second of two strategies is ahead, for every shape: by bytes, and by time as measured.

    Infinite: not at any W that was looked at, up to 4,096 or the largest measured.  NaN: the measured times are too
    close to tell.
    """
    found, errors = [], []
    for shape in _shapes(rows):
        skew, hits, dim, bags, _ = shape
        load = load_of(skew, slots[skew, hits], bags)
        times = {
            (r["strategy"], r["ranks"]): (r["p20"], r["p50"], r["p80"])
            for r in _select(rows, shape, "time", "fp32")
            if r["ranks"] > 1
        }
        measured_at = sorted({world for _, world in times})
        for (strategy, wire, world), counted in _bytes(rows, shape).items():
            sent = simulate(Layout(world, 1, strategy, wire), load, dim).bytes_sent
            errors.append(abs(sent / counted - 1))
        here = partial(row, "crossover", **dict(zip(_SHAPE, shape, strict=True)), wire="fp32")
        for pair in COMPARED:
            sent = [[simulate(Layout(world, 1, name), load, dim).bytes_sent for world in WORLDS] for name in pair]
            real = [[times[name, world] for world in measured_at] for name in pair]
            at = {"by bytes": crossing(WORLDS, *sent), "by time": clear_crossing(measured_at, *real)}
            found += [here(metric, "ranks", [world], strategy=" > ".join(pair)) for metric, world in at.items()]
    return [*found, row("expected bytes", "error", "share", errors)]


def load_of(skew: str, slots_ML: Tensor, bags: int) -> Load:
    """What is to be expected where a formula says it, else what is in the slots."""
    if skew == "uniform":
        return Load.uniform(SLOTS[skew], bags, slots_ML.shape[1])
    return CountedLoad.of(SLOTS[skew], slots_ML, bags)


def padding(worlds: Sequence[int], slots: Slots, hits: int, dim: int, hits_of_rank: int) -> list[Row]:
    """What messages of fixed capacity would send more, and how often they would not hold all hits."""
    found = []
    for world, (skew, slots_in_table) in product(worlds, SLOTS.items()):
        bags = hits_of_rank // hits
        here = partial(row, "padding", skew=skew, hits=hits, dim=dim, bags=bags, n=slots_in_table, ranks=world)
        fullness = Fullness.of(slots_in_table, slots[skew, hits], bags, world)
        enough = fullness.enough()
        found.append(here(f"steps over {CAPACITY}", "share", [fullness.steps_over(CAPACITY)]))
        found.append(here(f"capacity for {STEPS:.1%}", "of mean", [enough]))
        for capacity, metric in ((CAPACITY, f"padding at {CAPACITY}"), (enough, f"padding for {STEPS:.1%}")):
            for strategy, more in zip(_PADDED, padding_bytes(world, hits_of_rank, dim, capacity), strict=True):
                found.append(here(metric, "bytes", [more], strategy=strategy, wire="fp32"))
    return found


def text(rows: Sequence[Row]) -> str:
    """Every table, at most 100 columns wide."""
    parts = (_steps(rows), _crossovers(rows), _padding(rows), _overlap(rows))
    return "\n".join(line for part in parts for line in ("", *part))


def _steps(rows: Sequence[Row]) -> Iterator[str]:
    worlds = sorted({r["ranks"] for r in rows if r["benchmark"] == "step"})
    yield f"ms a step (p50 of the slowest rank), and MB that a rank sends in it (headers included); {CORES} cores"
    for shape in _shapes(rows):
        skew, hits, dim, bags, slots = shape
        yield ""
        yield f"{skew}, L = {hits}, D = {dim}: {bags:,} bags a rank, n = {slots:,}"
        columns = [f"{f'W = {world}':>8}" for world in worlds]
        yield f"{'':24}{''.join(columns)}    MB:{''.join(columns[1:])}"
        times = {(r["strategy"], r["wire"], r["ranks"]): r["p50"] for r in _select(rows, shape, "time")}
        sent = _bytes(rows, shape)
        for strategy, wire in dict.fromkeys(key[:2] for key in times):
            of_times = "".join(_cell(times.get((strategy, wire, world)), 1) for world in worlds)
            of_bytes = "".join(_cell(sent.get((strategy, wire, world)), 2, 1e-6) for world in worlds if world > 1)
            yield f"{strategy + ('' if wire == 'fp32' else ' ' + wire):24}{of_times}       {of_bytes}"


def _crossovers(rows: Sequence[Row]) -> Iterator[str]:
    found = [r for r in rows if r["benchmark"] == "crossover"]
    last = max(r["ranks"] for r in rows if r["benchmark"] == "step")
    yield "W from which on the second strategy is ahead of the first: predicted from bytes, measured in time"
    yield "(in time: its p80 is below the p20 of the first; even: at the largest W that holds for neither)"
    yield f"{'skew':12}{'L':>4}{'D':>5}  {'strategies':40}{'bytes':>9}{'time':>9}"
    for key in dict.fromkeys((*_shape(r), r["strategy"]) for r in found):
        at = {r["metric"]: r["p50"] for r in found if (*_shape(r), r["strategy"]) == key}
        of_bytes, of_time = _world(at["by bytes"], WORLDS[-1]), _world(at["by time"], last)
        yield f"{key[0]:12}{key[1]:4}{key[2]:5}  {key[-1]:40}{of_bytes:>9}{of_time:>9}"
    (error,) = (r for r in rows if r["benchmark"] == "expected bytes")
    yield f"expected bytes are off by {error['p50']:.2%} (p80 {error['p80']:.2%}) of those counted"


def _padding(rows: Sequence[Row]) -> Iterator[str]:
    found = [r for r in rows if r["benchmark"] == "padding"]
    counts = {r["ranks"]: f"{r['p50']:.2f} ms" for r in rows if r["benchmark"] == "counts"}
    yield f"counts first, or padding?  KB that a rank sends more with {' / '.join(_PADDED)};"
    yield f"L = {found[0]['hits']}, D = {found[0]['dim']}, {found[0]['bags']:,} bags a rank"
    yield f"{'':15}{f'capacity {CAPACITY} of the mean':34}capacity for {STEPS:.1%} of steps"
    yield f"{'  W':5}{'counts':10}{'KB more':14}{'steps over it':20}{'of the mean':18}KB more"
    for world in dict.fromkeys(r["ranks"] for r in found):
        values: dict[tuple, list[float]] = {}
        for r in (r for r in found if r["ranks"] == world):
            values.setdefault((r["metric"], r["strategy"]), []).append(r["p50"])

        def more(metric: str, values: dict = values) -> list[str]:
            both = zip(*(values[metric, strategy] for strategy in _PADDED), strict=True)
            return ["/".join(f"{count / 1e3:.0f}" for count in pair) for pair in both]

        over = " ".join(f"{share:.0%}" for share in values[f"steps over {CAPACITY}", ""])
        enough = " ".join(f"{capacity:.2f}" for capacity in values[f"capacity for {STEPS:.1%}", ""])
        cells = f"{counts.get(world, ''):10}{more(f'padding at {CAPACITY}')[0]:14}{over:20}{enough:18}"
        yield f"{world:3}  {cells}{' '.join(more(f'padding for {STEPS:.1%}'))}"
    yield f"three numbers are for {', '.join(SLOTS)}"


def _overlap(rows: Sequence[Row]) -> Iterator[str]:
    found = [r for r in rows if r["benchmark"] == "overlap"]
    yield "a memory layer in chunks: ms a step (p50), share of the messages' time that is hidden"
    for times in (r for r in found if r["metric"] == "time"):
        hidden = next(
            r for r in found if r["metric"] == "hidden share" and all(r[k] == times[k] for k in ("ranks", "strategy"))
        )
        share = f"{hidden['p50']:.0%}" if times["ranks"] > 1 else "-"
        yield f"W = {times['ranks']}  {times['strategy']:24}{times['p50']:8.0f} ms{share:>8}"


def _select(rows: Sequence[Row], shape: tuple, metric: str, wire: str | None = None) -> Iterator[Row]:
    for r in rows:
        if r["benchmark"] == "step" and _shape(r) == shape and r["metric"] == metric and wire in (None, r["wire"]):
            yield r


def _bytes(rows: Sequence[Row], shape: tuple) -> dict[tuple[str, str, int], float]:
    """Bytes that a rank sends in a step, all kinds together, by strategy, wire and W."""
    sent: dict[tuple[str, str, int], float] = {}
    for metric in KINDS:
        for r in _select(rows, shape, metric):
            key = r["strategy"], r["wire"], r["ranks"]
            sent[key] = sent.get(key, 0) + r["p50"]
    return sent


def _shapes(rows: Sequence[Row]) -> list[tuple]:
    order = list(SLOTS)
    shapes = dict.fromkeys(_shape(r) for r in rows if r["benchmark"] == "step")
    return sorted(shapes, key=lambda shape: (order.index(shape[0]), *shape[1:3]))


def _shape(r: Row) -> tuple:
    return tuple(r[key] for key in _SHAPE)


def _cell(value: float | None, digits: int, scale: float = 1) -> str:
    return f"{'' if value is None else f'{value * scale:.{digits}f}':>8}"


def _world(at: float, last: int) -> str:
    if math.isnan(at):
        return "even"
    if math.isinf(at):
        return f"> {last}"
    return "<= 2" if at <= 2 else f"{at:.1f}".removesuffix(".0")
