"""Rows in memory as numpy columns, cut into batches by vectorised gathers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from msn_dist.data.batch import Batch
from msn_dist.data.schema import Schema


def ragged_index(starts_R: np.ndarray, lengths_R: np.ndarray) -> np.ndarray:
    """Indices starts[0], starts[0] + 1, ..., of every run (start, length), one run after the other; int64."""
    ends_R = np.cumsum(lengths_R)
    return np.arange(ends_R[-1] if len(ends_R) else 0) + np.repeat(starts_R - ends_R + lengths_R, lengths_R)


@dataclass(frozen=True)
class Lists:
    """List columns of equal lengths: one id list alone, or all columns of a history.

    Values of a column lie row after row; `starts_R` says where each row begins.
    """

    lengths_R: np.ndarray
    columns: dict[str, np.ndarray]

    def take(self, rows: np.ndarray, starts_R: np.ndarray) -> Lists:
        lengths = self.lengths_R[rows]
        index = ragged_index(starts_R[rows], lengths)
        return Lists(lengths, {key: values[index] for key, values in self.columns.items()})


@dataclass(frozen=True)
class Table:
    """R rows. Shape suffixes: R rows, F dense features, K tasks.

    Ids keep the integer type of their file, as half the bytes gather faster; lengths and groups are int64.
    """

    ids: dict[str, np.ndarray]  # columns with one id a row, each [R]
    lists: list[Lists]
    dense_RF: np.ndarray  # float32
    labels_RK: np.ndarray  # float32
    groups_R: np.ndarray

    def __len__(self) -> int:
        return len(self.groups_R)

    def starts(self) -> list[np.ndarray]:
        """Where each row begins in the values of every entry of `lists`."""
        return [np.cumsum(part.lengths_R) - part.lengths_R for part in self.lists]

    def take(self, rows: np.ndarray, starts: list[np.ndarray]) -> Table:
        """The given rows, in that order; `starts` is what `starts()` returned."""
        return Table(
            {key: values[rows] for key, values in self.ids.items()},
            [part.take(rows, starts_R) for part, starts_R in zip(self.lists, starts, strict=True)],
            self.dense_RF[rows],
            self.labels_RK[rows],
            self.groups_R[rows],
        )

    @staticmethod
    def concatenate(tables: Sequence[Table]) -> Table:
        if len(tables) == 1:
            return tables[0]
        first = tables[0]
        return Table(
            {key: np.concatenate([t.ids[key] for t in tables]) for key in first.ids},
            [
                Lists(
                    np.concatenate([t.lists[i].lengths_R for t in tables]),
                    {key: np.concatenate([t.lists[i].columns[key] for t in tables]) for key in part.columns},
                )
                for i, part in enumerate(first.lists)
            ],
            np.concatenate([t.dense_RF for t in tables]),
            np.concatenate([t.labels_RK for t in tables]),
            np.concatenate([t.groups_R for t in tables]),
        )

    def tensors(self, keys: list[str]) -> list[Tensor]:
        """Values and lengths of the sparse keys (key after key), dense, labels, groups; `as_batch` wraps them."""
        ones = np.ones(len(self), dtype=np.int64)
        columns = {key: (values, ones) for key, values in self.ids.items()}
        for part in self.lists:
            columns.update({key: (values, part.lengths_R) for key, values in part.columns.items()})
        lengths = np.concatenate([columns[key][1] for key in keys])
        values = np.concatenate([columns[key][0] for key in keys], dtype=np.int64)
        return [torch.from_numpy(x) for x in (values, lengths, self.dense_RF, self.labels_RK, self.groups_R)]


def as_batch(tensors: list[Tensor], schema: Schema) -> Batch:
    """The batch over what `Table.tensors(schema.sparse_keys)` returned; nothing is copied."""
    values, lengths, dense_BF, labels_BK, groups_B = tensors
    sparse = KeyedJaggedTensor(keys=schema.sparse_keys, values=values, lengths=lengths, stride=len(groups_B))
    return Batch(sparse, dense_BF, labels_BK, groups_B)
