"""python -m benchmarks.exchange: step time and bytes of every exchange strategy, and what decides between them.

A step is the read of a value table and its backward with the row-wise Adagrad update, on W = 1, 2, 4, 8 gloo ranks of
one machine.  Every rank has 32,768 hits a step, in bags of L = 8, 32 or 128; slots come from benchmarks.exchange_slots.
Ranks have one thread each and share the cores of the machine: once W exceeds the cores, times show work and not
speed-up, and messages cost copies, not a network.  two_level has two nodes of W / 2 ranks.

Before a strategy is timed at a shape, its output and the gradient of its weights are compared with the plain table, and
the bytes that it counts with the formulas of msn_dist.planner.traffic; a difference ends the benchmark.  Then all
strategies take turns, and the slowest rank of each step counts.

Besides: the crossovers (benchmarks.exchange_model), what it costs to send counts ahead and what padding instead would
cost (benchmarks.exchange_counts), and what chunks hide (benchmarks.exchange_overlap).

Writes benchmarks/results/exchange.csv and exchange.svg; --quick measures a little and writes nothing.

Shape suffixes: W ranks, M bags of a rank, L hits a bag, D value width, n slots.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from msn_dist.training.quiet import quiet_libraries

quiet_libraries()  # before torchrec is imported below

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks import exchange_slots, exchange_tables  # noqa: E402
from benchmarks.exchange_counts import seconds_of_counts  # noqa: E402
from benchmarks.exchange_overlap import seconds_and_hidden  # noqa: E402
from benchmarks.exchange_plot import draw  # noqa: E402
from benchmarks.exchange_tables import KINDS, Row, row  # noqa: E402
from benchmarks.results import write_rows  # noqa: E402
from msn_dist.memory.values import MemoryValues, ValueSharding  # noqa: E402
from msn_dist.planner.traffic import Demand, bytes_of_step  # noqa: E402
from msn_dist.sharding import ShardedMemoryValues, ValueOptimizer  # noqa: E402
from msn_dist.sharding.strategies import STRATEGIES, shard_values  # noqa: E402
from msn_dist.sharding.traffic import HEADERS, Traffic  # noqa: E402

HITS_OF_RANK, MOST_HITS = 2**15, 128
EXACT = [(strategy, "fp32") for strategy in STRATEGIES]
LOSSY = list(product(("row_pooled", "row_gather_unique"), ("bf16", "int8")))
PADDED_WORLDS = (64, 512)  # beside those measured
LOSSY_ERROR = 0.03  # of a norm over that of what is right


@dataclass(frozen=True)
class Shape:
    skew: str
    hits: int  # L
    dim: int  # D

    @property
    def slots(self) -> int:
        return exchange_slots.SLOTS[self.skew]

    @property
    def bags(self) -> int:
        return HITS_OF_RANK // self.hits

    def described(self) -> Row:
        return {"skew": self.skew, "hits": self.hits, "dim": self.dim, "bags": self.bags, "n": self.slots}


@dataclass(frozen=True)
class Measurements:
    """What a run of the benchmark measures."""

    worlds: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]  # (L, D), with every skew
    wide: tuple[tuple[int, int], ...]  # (L, D) with the small table of "kuairand" only
    rounds: tuple[int, int]  # at least and at most; between them as many as `seconds` allow
    seconds: float
    training_steps: int
    overlap_worlds: tuple[int, ...]
    overlap_rows: int  # a rank
    chunks: tuple[int, ...]
    repeats: int  # of overlap

    def shapes_of(self, slots: int, dim: int) -> list[Shape]:
        """The shapes that share a table of so many slots and columns."""
        all_shapes = [Shape(skew, *shape) for skew, shape in product(exchange_slots.SLOTS, self.shapes)]
        all_shapes += [Shape("kuairand", *shape) for shape in self.wide]
        return [shape for shape in all_shapes if (shape.slots, shape.dim) == (slots, dim)]

    def tables(self) -> list[tuple[int, int]]:
        """(n, D) of all shapes."""
        dims = {dim for _, dim in (*self.shapes, *self.wide)}
        tables = product(sorted(set(exchange_slots.SLOTS.values())), sorted(dims))
        return [table for table in tables if self.shapes_of(*table)]


FULL = Measurements(
    worlds=(1, 2, 4, 8),
    shapes=tuple(product((8, 32, 128), (16, 64))),
    wide=((32, 256),),
    rounds=(3, 15),
    seconds=4.0,
    training_steps=80,
    overlap_worlds=(1, 2, 4),
    overlap_rows=2048,
    chunks=(1, 2, 4),
    repeats=5,
)
QUICK = Measurements(
    worlds=(1, 2, 4),
    shapes=((32, 64),),
    wide=(),
    rounds=(2, 2),
    seconds=0.0,
    training_steps=4,
    overlap_worlds=(1, 2),
    overlap_rows=256,
    chunks=(1, 2),
    repeats=2,
)


def main() -> None:
    # libraries are imported once and not by every rank
    multiprocessing.set_forkserver_preload(["msn_dist.training.run", "benchmarks.exchange_overlap"])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few shapes, a few steps; nothing is written")
    chosen = QUICK if parser.parse_args().quick else FULL
    slots = hits_of_all(chosen)
    rows = on_ranks(chosen, slots)
    rows += exchange_tables.crossovers(rows, slots)
    padded = [world for world in (*chosen.worlds, *PADDED_WORLDS) if world > 1]
    rows += exchange_tables.padding(padded, slots, hits=32, dim=64, hits_of_rank=HITS_OF_RANK)
    print(exchange_tables.text(rows))
    if chosen is FULL:
        torch.set_num_threads(1)  # as the ranks had, for the record
        with contextlib.redirect_stdout(None):  # the tables above say the same in fewer lines
            path = write_rows("exchange.csv", rows)
        print(f"written to {path} and {draw(path)}")


def hits_of_all(chosen: Measurements) -> dict[tuple[str, int], Tensor]:
    """{(skew, L): slots_ML int32 of the bags of all ranks, rank after rank}."""
    hits_of_ranks, lengths = HITS_OF_RANK * max(chosen.worlds), sorted({hits for hits, _ in chosen.shapes})
    print("training a memory on KuaiRand", flush=True)
    read_ML = exchange_slots.kuairand_hits(hits_of_ranks // lengths[0], lengths[-1], chosen.training_steps)
    slots = {}
    for hits in lengths:
        bags = hits_of_ranks // hits
        slots["uniform", hits] = exchange_slots.uniform(bags, hits)
        slots["zipf 1.05", hits] = exchange_slots.zipf_on_sub_keys(bags, hits)
        slots["kuairand", hits] = read_ML[:bags, :hits].contiguous()
    return {key: slots_ML.to(torch.int32) for key, slots_ML in slots.items()}


def on_ranks(chosen: Measurements, slots: dict[tuple[str, int], Tensor]) -> list[Row]:
    """Rows of what is measured on ranks, in one launch for each W."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(slots, folder / "slots.pt")
        plain = {table: MemoryValues(*table, init_std=1.0, seed=0) for table in chosen.tables()}
        torch.save({table: values.requires_grad_(False).eval() for table, values in plain.items()}, folder / "plain.pt")
        rows = []
        for world in chosen.worlds:
            print(f"measuring on {world} ranks", flush=True)
            mp.start_processes(_rank, (world, chosen, folder), nprocs=world, start_method="forkserver")
            rows += torch.load(folder / f"{world}.rows", weights_only=False)
    return rows


def _rank(rank: int, world: int, chosen: Measurements, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous{world}", rank=rank, world_size=world)
    rows = list(_of_world(dist.group.WORLD, chosen, folder))
    if rank == 0:
        torch.save(rows, folder / f"{world}.rows")
    # in this order: a model that outlives its group aborts the process at exit
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()


def _of_world(group: dist.ProcessGroup, chosen: Measurements, folder: Path) -> Iterator[Row]:
    world = group.size()
    slots = torch.load(folder / "slots.pt", mmap=True)
    plain = torch.load(folder / "plain.pt", mmap=True, weights_only=False)
    if world > 1:
        yield row("counts", "time", "ms", (1e3 * seconds_of_counts(group, 200)).tolist(), ranks=world)
    if world in chosen.overlap_worlds:
        results = seconds_and_hidden(group, chosen.overlap_rows, chosen.chunks, chosen.repeats)
        for chunks, (seconds, hidden) in results.items():
            overlap = partial(row, "overlap", ranks=world, strategy=f"row_pooled, {chunks} chunks", wire="fp32")
            yield overlap("time", "ms", (1e3 * seconds).tolist())
            yield overlap("hidden share", "", [hidden])
    for table in chosen.tables():
        layouts = EXACT + (LOSSY if world > 1 and table[1] == 64 else [])  # one rank sends nothing
        tables = {layout: _sharded(plain[table], ValueSharding(*layout), group) for layout in layouts}
        for shape in chosen.shapes_of(*table):
            slots_ML = slots[shape.skew, shape.hits][: world * shape.bags].to(torch.int64)
            yield from _of_shape(shape, group, tables, slots_ML.split(shape.bags), plain[table], chosen)


class _CopiedValues(MemoryValues):
    """Starts from a table that is there, as filling one takes longer than a measurement."""

    def __init__(self, whole: MemoryValues, sharding: ValueSharding) -> None:
        super().__init__(whole.slots, whole.dim, init_std=1.0, seed=0, sharding=sharding, device="meta")
        self._whole_nD = whole.weight.detach()

    def fill(self, rows_RC: Tensor, first_row: int, first_column: int = 0) -> None:
        rows, columns = rows_RC.shape
        rows_RC.copy_(self._whole_nD[first_row : first_row + rows, first_column : first_column + columns])


def _sharded(whole: MemoryValues, sharding: ValueSharding, group: dist.ProcessGroup) -> ShardedMemoryValues:
    # a learning rate of 0 leaves the values as they are: every step can be compared with the same plain table
    table, cpu = _CopiedValues(whole, sharding), torch.device("cpu")
    return shard_values(table, group, ValueOptimizer(learning_rate=0.0), cpu, _ranks_per_node(group.size()))


def _ranks_per_node(world: int) -> int:
    return max(1, world // 2)


def _of_shape(
    shape: Shape,
    group: dist.ProcessGroup,
    tables: dict[tuple[str, str], ShardedMemoryValues],
    slots_W: Sequence[Tensor],
    plain: MemoryValues,
    chosen: Measurements,
) -> list[Row]:
    rank, world = group.rank(), group.size()
    generator = torch.Generator().manual_seed(rank)
    weights_ML = torch.randn(slots_W[rank].shape, generator=generator).softmax(1)
    upstream_MD = torch.randn(shape.bags, shape.dim, generator=generator)
    step = partial(_step, slots_ML=slots_W[rank], weights_ML=weights_ML, upstream_MD=upstream_MD)
    expected, demand = step(plain), Demand.of(slots_W, plain.placement)

    sent, seconds = {}, 0.0
    for (strategy, wire), table in tables.items():
        table.exchange.traffic = Traffic(world)
        start = time.perf_counter()
        found = step(table)
        seconds += time.perf_counter() - start
        case = f"{strategy} {wire} at W = {world}, {shape}, rank {rank}"
        _check_result(found, expected, wire, case)
        sent[strategy, wire] = table.exchange.traffic.by_message()
        formula = bytes_of_step(strategy, demand, shape.dim, wire, _ranks_per_node(world))[rank]
        if sent[strategy, wire] != {way: messages for way, messages in formula.items() if messages}:
            raise RuntimeError(f"{case}: sent {sent[strategy, wire]}, and the formulas say {formula}")

    fewest, most = chosen.rounds
    rounds = torch.tensor(min(most, max(fewest, int(chosen.seconds / seconds))))
    dist.all_reduce(rounds, dist.ReduceOp.MIN, group=group)
    seconds_RT = torch.zeros(int(rounds), len(tables), dtype=torch.float64)
    for seconds_T in seconds_RT:
        for number, table in enumerate(tables.values()):
            dist.barrier(group)
            start = time.perf_counter()
            step(table)
            seconds_T[number] = time.perf_counter() - start
    dist.all_reduce(seconds_RT, dist.ReduceOp.MAX, group=group)  # the slowest rank of each step
    sent_W = [None] * world
    dist.all_gather_object(sent_W, sent, group=group)

    rows = []
    for number, layout in enumerate(tables):
        strategy, wire = layout
        here = partial(row, "step", **shape.described(), ranks=world, strategy=strategy, wire=wire)
        rows.append(here("time", "ms", (1e3 * seconds_RT[:, number]).tolist()))
        if world > 1:
            by_kind = [_by_kind(sent[layout]) for sent in sent_W]
            rows += [here(kind, "bytes", [kinds[kind] for kinds in by_kind]) for kind in KINDS]
    return rows


def _step(table: nn.Module, slots_ML: Tensor, weights_ML: Tensor, upstream_MD: Tensor) -> tuple[Tensor, Tensor]:
    """(pooled_MD, gradient of the weights)"""
    weights_ML = weights_ML.clone().requires_grad_()
    pooled_MD = table(slots_ML, weights_ML)
    pooled_MD.backward(upstream_MD)
    return pooled_MD.detach(), weights_ML.grad


def _check_result(found: Sequence[Tensor], expected: Sequence[Tensor], wire: str, case: str) -> None:
    for name, one, other in zip(("output", "gradient of the weights"), found, expected, strict=True):
        error = float((one - other).norm() / other.norm())
        right = torch.allclose(one, other, rtol=1e-4, atol=1e-4) if wire == "fp32" else error <= LOSSY_ERROR
        if not right:
            raise RuntimeError(f"{case}: the {name} is off by {error:.2g} of its norm")


def _by_kind(messages: dict[str, dict[str, int]]) -> dict[str, int]:
    forward = messages.get("forward", {})
    headers = sum(count for name, count in forward.items() if name in HEADERS)
    backward = sum(messages.get("backward", {}).values())
    return dict(zip(KINDS, (headers, sum(forward.values()) - headers, backward), strict=True))


if __name__ == "__main__":
    main()
