"""Bucketing by kernels against the sort of torch: the same order, rows and lengths, to the last bit; distinct rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from msn_dist.kernels.bucketing import bucket_hits
from msn_dist.sharding.buckets import bucket_rows, distinct_rows
from triton_device import DEVICE

BIG = 2**33  # rows of a table that int32 cannot count


def rows_of(bags: int, hits: int, rows: int, seed: int = 0) -> Tensor:
    """Skewed, so that some owners have many hits and some have none."""
    uniform = torch.rand(bags, hits, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (uniform**3 * rows).long().to(DEVICE)


def check(row_ML: Tensor, block: int, world: int) -> None:
    expected, expected_row_H = bucket_rows(row_ML, block, world)
    order_H, row_H, lengths_WM = bucket_hits(row_ML, block, world)
    assert (order_H.dtype, lengths_WM.dtype) == (torch.int64, torch.int64)
    assert row_H.dtype == expected_row_H.dtype == (torch.int32 if block < 2**31 else torch.int64)
    assert torch.equal(lengths_WM, expected.lengths_WM)
    assert torch.equal(order_H, expected.order_H)
    assert torch.equal(row_H, expected_row_H)


@pytest.mark.parametrize("world", [1, 2, 3, 8, 31, 32, 64, 300, 1024])
@pytest.mark.parametrize(("bags", "hits"), [(1, 1), (7, 5), (61, 32), (3, 300)])
def test_hits_come_by_owner_and_then_in_their_order(world: int, bags: int, hits: int) -> None:
    block = 37
    check(rows_of(bags, hits, block * world - 20), block, world)


@pytest.mark.parametrize("world", [1, 2, 64])
@pytest.mark.parametrize(("bags", "hits"), [(0, 4), (0, 0)])
def test_nothing_to_sort(world: int, bags: int, hits: int) -> None:
    check(rows_of(bags, hits, 10 * world), 10, world)


@pytest.mark.parametrize("world", [3, 100])
def test_all_hits_on_the_last_row_of_the_last_owner(world: int) -> None:
    row_ML = torch.full((40, 33), 11 * world - 1, device=DEVICE)
    check(row_ML, 11, world)
    check(torch.zeros_like(row_ML), 11, world)


@pytest.mark.parametrize("world", [2, 40])
def test_rows_beyond_32_bits(world: int) -> None:
    check(rows_of(50, 24, BIG), -(-BIG // world), world)  # local rows of 64 bits at W = 2, of 32 at W = 40
    check(BIG - 1 - rows_of(50, 24, 100), -(-BIG // world), world)


def test_rows_of_32_bits_and_rows_that_are_not_contiguous() -> None:
    row_ML = rows_of(30, 20, 700)
    check(row_ML.int(), 100, 7)
    check(row_ML.T, 100, 7)


@pytest.mark.parametrize("world", [8, 64])
def test_twice_is_the_same(world: int) -> None:
    row_ML = rows_of(50, 32, 10 * world)
    for one, other in zip(bucket_hits(row_ML, 10, world), bucket_hits(row_ML, 10, world), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 8, 31, 32, 300, 1024])
def test_a_million_hits(world: int) -> None:
    check(rows_of(32_768, 32, 2**24), -(-(2**24) // world), world)


@pytest.mark.parametrize(
    ("row_ML", "block", "world", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), 5, 2, r"rows of shape \[4\] and torch.int64: hits are int32 or int64"),
        (torch.zeros(4, 2), 5, 2, "torch.float32: hits are int32 or int64 of shape"),
        (torch.zeros(4, 2, dtype=torch.int64), 5, 1025, "1025 ranks: bucketing is for 1 to 1,024"),
        (torch.zeros(4, 2, dtype=torch.int64), 0, 2, "blocks of 0 rows"),
    ],
)
def test_what_cannot_be_is_refused(row_ML: Tensor, block: int, world: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bucket_hits(row_ML, block, world)


@pytest.mark.parametrize("rows", [20, 2000, 2**17, BIG])  # that are sorted as integers of 2, 4 and 8 bytes
@pytest.mark.parametrize("world", [1, 3, 8])
@pytest.mark.parametrize(("bags", "hits"), [(61, 32), (1, 1), (0, 4)])
def test_distinct_rows_are_told_by_owner_with_the_place_of_every_hit(
    rows: int, world: int, bags: int, hits: int
) -> None:
    row_ML, block = rows_of(bags, hits, rows), -(-rows // world)
    row_H, where_ML, rows_W = distinct_rows(row_ML, block, world)
    expected_A, expected_where_ML = torch.unique(row_ML, return_inverse=True)
    assert row_H.dtype == (torch.int32 if block < 2**31 else torch.int64)
    assert torch.equal(row_H[: len(expected_A)].long(), expected_A % block)
    assert torch.equal(where_ML, expected_where_ML)
    assert torch.equal(rows_W, (expected_A // block).bincount(minlength=world))
