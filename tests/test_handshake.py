"""Ranks with different numbers of batches start, stop and fail together."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from msn_dist.data.batch import Batch
from msn_dist.data.handshake import in_step
from msn_dist.data.schema import Schema
from msn_dist.errors import InputError

SCHEMA = Schema(name="one", tables={"a": 10}, ids={"a": "a"}, dense=["d"], labels=["y"], group="g")


def batch_of(rows: int) -> Batch:
    ones = torch.ones(rows, dtype=torch.int64)
    sparse = KeyedJaggedTensor(keys=["a"], values=ones, lengths=ones, stride=rows)
    return Batch(sparse, torch.zeros(rows, 1), torch.zeros(rows, 1), ones)


def batches(sizes: list[int], error: Exception | None = None) -> Iterator[Batch]:
    yield from map(batch_of, sizes)
    if error is not None:
        raise error


def steps(source: Iterator[Batch]) -> list[tuple[int, int]]:
    """(own rows, total rows) of every step, with a collective in each as a model would have."""
    seen = []
    for batch, total_rows in in_step(source, SCHEMA):
        check = torch.tensor(len(batch))
        dist.all_reduce(check)
        assert check.item() == total_rows and batch.sparse.keys() == ["a"]
        seen.append((len(batch), total_rows))
    return seen


def uneven_lengths(rank: int) -> None:
    sizes = [[4, 4, 1], [], [4]][rank]
    assert steps(batches(sizes)) == list(zip([*sizes, 0, 0, 0], [8, 4, 1], strict=False))


def no_rank_has_a_batch(rank: int) -> None:
    assert steps(batches([])) == []


def input_error_on_one_rank_reaches_all_after_the_steps_before_it(rank: int) -> None:
    seen = []
    error = InputError("file x, row group 3: bad") if rank == 1 else None
    with pytest.raises(InputError, match="^file x, row group 3: bad$"):
        for _, total_rows in in_step(batches([2, 2] if rank == 1 else [2, 2, 2, 2], error), SCHEMA):
            seen.append(total_rows)
    assert seen == [6, 6]


def input_error_on_a_rank_that_others_have_outlived(rank: int) -> None:
    with pytest.raises(InputError, match="late"):
        steps(batches([1, 1, 1], InputError("late")) if rank == 2 else batches([1]))


def other_error_keeps_its_type_on_its_rank_and_names_it_on_the_others(rank: int) -> None:
    kind, message = (KeyError, "oops") if rank == 2 else (RuntimeError, "rank 2 failed while reading data: KeyError")
    with pytest.raises(kind, match=message):
        steps(batches([1], KeyError("oops") if rank == 2 else None))


def all_ranks_may_stop_early_and_go_on_with_other_collectives(rank: int) -> None:
    for _ in range(2):
        source = in_step(batches([3] * (2 + 3 * rank)), SCHEMA)
        assert [next(source)[1] for _ in range(2)] == [9, 9]
        source.close()
        assert steps(batches([rank])) == [(rank, 3)]


CASES = [
    uneven_lengths,
    no_rank_has_a_batch,
    input_error_on_one_rank_reaches_all_after_the_steps_before_it,
    input_error_on_a_rank_that_others_have_outlived,
    other_error_keeps_its_type_on_its_rank_and_names_it_on_the_others,
    all_ranks_may_stop_early_and_go_on_with_other_collectives,
]


def run_cases(rank: int, world_size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    for case in CASES:
        case(rank)
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()


def test_three_ranks_stay_in_step():
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(run_cases, (3, f"{folder}/store"), nprocs=3, start_method="fork")


def test_one_process_without_a_group_passes_its_batches_through():
    assert [(len(batch), total) for batch, total in in_step(batches([3, 1]), SCHEMA)] == [(3, 3), (1, 1)]
