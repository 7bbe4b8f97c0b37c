"""What a rank does for the exchange of one memory in a step, beside sending: the time of `cost` is made of it.

`Work` is counted from the code of the strategies (msn_dist/sharding).  Passes over device memory are counted where a
strategy writes tensors of its own: encoding, decoding and adding up what travels, the division of gradients by W.

Symbols as in docs/exchange.md: m bags of a rank, L hits a bag, n slots, D value width, e bytes of a value, W ranks,
E(W) owners that a bag hits, U(R) distinct rows that R ranks hit.  Hits on an owner are those of the busiest one.  The
second level of two_level is another sum and its messages, of Q m rows where there are Q groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from msn_dist.memory.values import VALUE_DTYPES
from msn_dist.planner.home_work import HomeWork
from msn_dist.planner.layout import Layout
from msn_dist.planner.load import Load
from msn_dist.sharding.wire import row_bytes

_FLOAT = 4  # bytes of float32, in which sums and gradients are


@dataclass
class Work:
    """In one step, forward and backward together unless a name says else."""

    bucketed: float = 0.0  # hits sorted by owner
    asked: float = 0.0  # hits among which the distinct rows are found before these are asked for
    distinct: float = 0.0  # hits among which the update finds the distinct rows
    read: float = 0.0  # hits looked up, each a row of `row_bytes`, and stepped in the backward
    rows: float = 0.0  # distinct ones among them
    rows_by_chunk: float = 0.0  # the same of each chunk for itself
    row_bytes: float = 0.0
    whole: bool = False  # the gradient has all rows, and what steps them is among the passes
    single: bool = False  # a hit is a bag of its own, without a weight
    given: float = 0.0  # bytes of what look-ups give, and of its gradient
    weighed: float = 0.0  # bytes of the pass over looked up rows that gives weights their gradients before an update
    read_again: bool = False  # by the update
    home: HomeWork | None = None  # rows that are weighted where they came
    cached: float = 0.0  # hits among which a cache finds the distinct ones
    forward: list[float] = field(default_factory=list)  # bytes of each pass over device memory, read and written
    backward: list[float] = field(default_factory=list)


def exchange_work(layout: Layout, load: Load, dim: int) -> Work:
    """The work of the busiest owner."""
    work = _by_kernels(layout, load, dim)
    element = VALUE_DTYPES[layout.value_dtype].itemsize
    if len(load.chunks) > 1:
        _put_off_the_update(work, layout, element)
    if layout.lookup == "reference":
        width, weighted = round(work.row_bytes / element), work.home is None
        work.forward += _in_torch(work.read, width, element, weighted)
        work.backward += _in_torch_backward(work.read, width, element, weighted)
        if not work.whole:
            work.distinct = work.read
            work.backward.append(_step_in_torch(work.rows, width, element))
        work.read = 0.0
    if layout.optimizer == "rowwise_adam":
        work.backward += _first_moments(layout, load, dim)
    return work


def _put_off_the_update(work: Work, layout: Layout, element: int) -> None:
    """It waits for the gradients of all chunks, and takes hits and gradients of all at once (sharding/hits.py)."""
    work.backward += [16 * work.read, 2 * work.given]
    work.read_again = layout.lookup == "fbgemm"  # whose update comes with a look-up of its own
    if work.home is None and layout.lookup != "reference":  # which has this pass anyway
        work.weighed = _weighed(work.read, round(work.row_bytes / element), element)


def _by_kernels(layout: Layout, load: Load, dim: int) -> Work:
    world, hits = layout.world, load.bags * load.hits
    element = VALUE_DTYPES[layout.value_dtype].itemsize
    if world == 1:
        given = load.bags * dim * _FLOAT
        work = Work(read=hits, rows=load.rows(1), row_bytes=dim * element, given=given, forward=[16 * hits])
        work.rows_by_chunk = load.rows_by_chunk(1)
        return work
    busiest = load.owner_load(world, once=layout.strategy == "row_gather_unique")
    of_owner = load.rows(world) / world
    match layout.strategy:
        case "row_pooled" | "row_pooled_sparse" | "two_level":
            sparse = layout.strategy == "row_pooled_sparse"
            sums = load.bags * (load.owners_of_bag(world) if sparse else world)
            given = sums * dim * _FLOAT
            work = Work(bucketed=hits, read=hits * busiest, rows=of_owner, row_bytes=dim * element, given=given)
            work.forward = [40 * hits, *_coded(layout.wire, sums, dim)]
            if sparse:  # pairs are counted and found, first hits are marked and unmarked, sums are added to their bags
                work.forward += [17 * world * load.bags, 16 * world * load.bags, 16 * sums, 24 * sums]
                work.forward += [9 * hits, 9 * hits, 3 * given]
            else:
                work.forward += [9 * world * load.bags, given]
            # the gradient of a sum, once for each owner; divided by W
            work.backward = [8 * hits, given, *_coded(layout.wire, sums, dim), 2 * given]
            if layout.strategy == "two_level":  # sums are put in the order of places, and their gradients back
                by_place, second = 2 * given, layout.groups * load.bags
                both_ways = [by_place, *_coded(layout.wire, second, dim), second * dim * _FLOAT]
                work.forward += both_ways
                work.backward += both_ways
        case "row_gather" | "row_gather_unique":
            unique = layout.strategy == "row_gather_unique"
            rows = load.rows_by_chunk(1) if unique else hits
            given = rows * dim * _FLOAT
            work = Work(read=rows * busiest, rows=of_owner, row_bytes=dim * element, single=True, given=given)
            work.bucketed, work.asked = (0, hits) if unique else (hits, 0)
            work.home = HomeWork(hits, rows, dim * _FLOAT, by_kernels=layout.lookup == "triton", once=not unique)
            work.forward = [40 * hits, *_coded(layout.wire, rows, dim)]
            work.backward = [*_coded(layout.wire, rows, dim), 2 * given]
        case "column":
            columns, all_hits = -(-dim // world), world * hits
            given = world * load.bags * columns * _FLOAT
            work = Work(read=all_hits, rows=load.rows(world), row_bytes=columns * element, given=given)
            work.rows_by_chunk = load.rows_by_chunk(world)
            work.forward = [24 * all_hits, *_coded(layout.wire, world * load.bags, columns)]
            work.backward = [*_coded(layout.wire, world * load.bags, columns), 2 * given]
            if layout.lookup == "triton":  # distinct rows are found and copied, and stepped by torch (sharding/sums.py)
                work.distinct = all_hits
                work.backward += [2 * work.rows * work.row_bytes, _step_in_torch(work.rows, columns, element)]
        case "replicated":
            table, given = load.slots * dim, load.bags * dim * _FLOAT  # numbers, bytes
            work = Work(read=hits, rows=load.rows(1), row_bytes=dim * element, given=given, whole=True)
            work.rows_by_chunk = load.rows_by_chunk(1)
            work.forward = [24 * hits]
            block = table / world
            stepped = load.rows(world) / world if layout.optimizer == "rowwise_adam" else load.slots / world
            # zeros; a block's parts are added up, its rows stepped and repeated for all; all new rows are put in place
            work.backward = [2 * given, _FLOAT * table, *_coded(layout.wire, load.slots, dim), _FLOAT * (table + block)]
            work.backward += [_step_in_torch(stepped, dim, element), _FLOAT * (block + table)]
            work.backward.append((_FLOAT + element) * table)
        case _:
            raise ValueError(f"unknown strategy {layout.strategy!r}")
    work.rows_by_chunk = work.rows_by_chunk or load.rows_by_chunk(world) / world
    return work


def _first_moments(layout: Layout, load: Load, dim: int) -> list[float]:
    """Of the rows that are stepped: read and written by a kernel; by torch taken out, scaled, added to, put back."""
    world = layout.world
    by_column = layout.strategy == "column" and world > 1
    rows, width = (load.rows(world), -(-dim // world)) if by_column else (load.rows(world) / world, dim)
    size = rows * width * _FLOAT
    by_torch = layout.lookup == "reference" or (layout.strategy in ("column", "replicated") and world > 1)
    return [2 * size, 2 * size, 2 * size, 3 * size, 2 * size] if by_torch else [2 * size]


def _coded(wire: str, rows: float, dim: int) -> list[float]:
    """Encoding and decoding of so many rows; float32 travels as it is."""
    return [] if wire == "fp32" else [rows * (_FLOAT * dim + row_bytes(wire, dim))] * 2


def _in_torch(hits: float, dim: int, element: int, weighted: bool = True) -> list[float]:
    """TorchSums.pooled: the rows, and if they are `weighted` there times their weights, added to their bags."""
    row = dim * _FLOAT
    return [hits * (dim * element + row), *([2 * hits * row, 3 * hits * row] if weighted else [])]


def _in_torch_backward(hits: float, dim: int, element: int, weighted: bool = True) -> list[float]:
    """TorchSums.gradients: the weights' products, gradients of hits, added up by rows.

    The first two only of rows that are `weighted` there.
    """
    row = dim * _FLOAT
    of_hits = [_weighed(hits, dim, element), 2 * hits * row, 3 * hits * row] if weighted else []
    return [*of_hits, 3 * hits * row]


def _step_in_torch(rows: float, dim: int, element: int) -> float:
    """ReferenceLookup.step_rows, all passes together, counted in its row-wise Adagrad.

    A value is taken out and put back as stored and as float32; squares and their sum, times the rate, over the root,
    and the difference are ten floats; rounding at random reads and writes 54 bytes.
    """
    return rows * dim * (4 * element + 10 * _FLOAT + (54 if element < _FLOAT else 0))


def _weighed(hits: float, dim: int, element: int) -> float:
    """sums.weights_gradient: the rows times the gradients of their bags; with 16 bits both are copied out first."""
    row = dim * _FLOAT
    return hits * (2 * row if element == _FLOAT else 5 * row + 3 * dim * element)
