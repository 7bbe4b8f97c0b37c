"""Batches come to the device in their order, and the steps behind them end when the consumer does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from msn_dist.data.batch import Batch
from msn_dist.data.on_device import on_device

CPU = torch.device("cpu")


def batch_of(number: int, rows: int) -> Batch:
    ids = torch.arange(2 * rows) + number
    sparse = KeyedJaggedTensor(keys=["a", "b"], values=ids, lengths=torch.ones_like(ids), stride=rows)
    return Batch(sparse, torch.full((rows, 3), float(number)), torch.zeros(rows, 1), torch.arange(rows))


def steps(sizes: list[int], ended: list[bool]) -> Iterator[tuple[Batch, int]]:
    try:
        for number, rows in enumerate(sizes):
            yield batch_of(number, rows), 10 * rows
    finally:
        ended.append(True)


DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("sizes", [[], [3], [3, 0, 5, 1]], ids=str)
def test_every_batch_comes_as_it_was(sizes: list[int], device: torch.device) -> None:
    ended: list[bool] = []
    seen = 0
    for batch, rows in on_device(steps(sizes, ended), device):
        expected = batch_of(seen, sizes[seen])
        assert rows == 10 * sizes[seen] and len(batch) == sizes[seen]
        for part in (batch.dense_BF, batch.labels_BK, batch.groups_B, batch.sparse.values()):
            assert part.device.type == device.type
        assert torch.equal(batch.dense_BF.cpu(), expected.dense_BF)
        assert torch.equal(batch.sparse.values().cpu(), expected.sparse.values())
        assert batch.sparse.length_per_key() == [sizes[seen]] * 2
        seen += 1
    assert seen == len(sizes) and ended == [True]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_the_steps_behind_are_closed_with_it(device: torch.device) -> None:
    ended: list[bool] = []
    coming = on_device(steps([2, 2, 2, 2], ended), device)
    next(coming)
    coming.close()
    assert ended == [True]
