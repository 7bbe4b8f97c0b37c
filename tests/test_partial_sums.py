"""Scratch of torch's sums on a GPU: by hand, and as its allocator counts it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from msn_dist.planner.partial_sums import partial_sums_bytes

MIB = 2**20
CASES = {
    "bias of an MLP": (lambda: torch.empty(8192, 2048), [0]),
    "bias of an MLP in bf16": (lambda: torch.empty(8192, 2048, dtype=torch.bfloat16), [0]),
    "bias of a token's layer": (lambda: torch.empty(16, 8192, 1024), [1]),
    "bias, tokens side by side": (lambda: torch.empty(8192, 16, 256), [0]),
    "bias of one output": (lambda: torch.empty(8192, 1), [0]),
    "odd width": (lambda: torch.empty(8192, 301), [0]),
    "even width": (lambda: torch.empty(8192, 302), [0]),
    "narrow rows that lie together": (lambda: torch.empty(8192, 10, 30), [0]),
    "few rows": (lambda: torch.empty(100, 2048), [0]),
    "many outputs": (lambda: torch.empty(2048, 2**20), [0]),
    "leading dimensions": (lambda: torch.empty(64, 128, 512), [0, 1]),
    "of a transposed tensor": (lambda: torch.empty(2048, 8192).t(), [1]),
    "along rows": (lambda: torch.empty(8192, 2048), [1]),
    "all of it": (lambda: torch.empty(8192, 2048), []),
    "whole numbers": (lambda: torch.empty(8192, 512, dtype=torch.int64), [0]),
}


def test_a_column_is_shared_by_the_blocks_that_a_gpu_has_room_for() -> None:
    # blocks of 32 x 4 threads, 4 outputs a thread: 16 blocks a row, 132 * 16 fit, and 128 leave a thread 16 values
    assert partial_sums_bytes(torch.empty(8192, 2048), [0]) == 4 * 2048 * 128 * (32 * 4)
    assert partial_sums_bytes(torch.empty(8192, 4096), [0]) == 4 * 4096 * (132 * 16 // 32) * (32 * 4)


@pytest.mark.parametrize("name", ["few rows", "many outputs", "along rows", "all of it"])
def test_no_blocks_share_short_columns_many_columns_or_rows(name: str) -> None:
    make, dims = CASES[name]
    with torch.device("meta"):
        assert partial_sums_bytes(make(), dims) == 0


def test_dimensions_that_lie_one_in_the_other_count_as_one() -> None:
    sizes = [partial_sums_bytes(torch.empty(8192, *shape), [0]) for shape in ((300,), (10, 30), (301,), (302,))]
    assert sizes[0] == sizes[1] > 2 * max(sizes[2:]), "300 columns are added four at a time, 301 one, 302 two"


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_scratch_is_what_the_allocator_counts(name: str) -> None:
    make, dims = CASES[name]
    with torch.device("cuda"):
        x = make()
    if torch.cuda.get_device_properties(x.device).multi_processor_count != 132:
        pytest.skip("a GPU with another number of multiprocessors shares otherwise")
    x.sum(dims)
    taken = _peak(lambda: x.sum(dims))
    assert taken - partial_sums_bytes(x, dims) == pytest.approx(x.sum(dims).nbytes, abs=MIB // 4)


def _peak(run) -> int:
    """Bytes beyond what there is before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept: Tensor = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return peak
