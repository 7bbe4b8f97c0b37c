"""Streaming reader of a folder of Parquet files: every row once an epoch, over ranks and reader workers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from msn_dist.data.batch import Batch
from msn_dist.data.row_group import RowGroup, open_file, read_row_group
from msn_dist.data.schema import Schema
from msn_dist.data.table import Table, as_batch
from msn_dist.errors import InputError


class ParquetReader:
    """Batches of this rank's share of the rows in ``folder/*.parquet``.

    The unit of work is a row group. All ranks put the units in the same (seed, epoch) order and deal
    them out with balanced row counts, so every row is read by exactly one rank; ranks may get a
    different number of batches, or none (see `handshake.in_step`). With `shuffle`, rows are permuted
    within `shuffle_buffer` rows. The last batch, of every reader worker if there are any, may be short.

    Footers are checked against the schema here, values as they are read; both raise InputError.

    Args:
        folder: one split, for example ``data/train``.
        batch_size: rows of this rank in a step.
        workers: reader processes of this rank; 0 reads in the calling process.
        pinned: batches are to go to a GPU; what workers read is taken over and pinned by a thread of its own.
    """

    def __init__(
        self,
        folder: str | Path,
        schema: Schema,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = False,
        shuffle_buffer: int = 65_536,
        workers: int = 0,
        pinned: bool = False,
    ) -> None:
        self.schema, self.batch_size = schema, batch_size
        self.rank, self.world_size, self.workers, self.pinned = rank, world_size, workers, pinned
        self.seed, self.shuffle, self.shuffle_buffer = seed, shuffle, shuffle_buffer
        self._footers = {path: open_file(path, schema) for path in _files(Path(folder))}
        self._units = [
            RowGroup(path, index, footer.row_group(index).num_rows)
            for path, footer in self._footers.items()
            for index in range(footer.num_row_groups)
        ]
        self.num_rows = sum(unit.rows for unit in self._units)
        if self.num_rows == 0:
            raise InputError(f"{folder}: the split has no rows (files: {len(self._footers)}); prepare the data again")
        self._epoch, self._batches, self._resume_at = 0, 0, 0

    @property
    def num_batches(self) -> int:
        """Batches of this rank in an epoch: the order of row groups decides who reads which, not how many rows."""
        shares = _deal(_deal(self._units, self.world_size)[self.rank], max(1, self.workers))
        return sum(-(-sum(unit.rows for unit in share) // self.batch_size) for share in shares)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration; a position loaded for the same epoch is kept."""
        if epoch != self._epoch:
            self._epoch, self._batches, self._resume_at = epoch, 0, 0

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """This rank's position, and what must be equal for it to mean the same rows later.

        Args:
            batches: batches of this epoch that were used, where the consumer is behind the reader
                (`in_step` reads one batch ahead, `on_device` another one); default: all that were yielded.
        """
        used = self._batches if batches is None else batches
        return {"epoch": self._epoch, "batches": used, "reader": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after `state`; inside an epoch that takes an equal reader, else InputError names the difference."""
        for name, value in self._identity().items():
            if state["batches"] and state["reader"][name] != value:
                raise InputError(
                    f"cannot resume inside epoch {state['epoch']}: {name} was {state['reader'][name]} and is {value}; "
                    f"use the old {name}, or a checkpoint from the end of an epoch"
                )
        self._epoch, self._batches, self._resume_at = state["epoch"], state["batches"], state["batches"]

    def __iter__(self) -> Iterator[Batch]:
        start, self._resume_at = self._resume_at, 0
        self._batches = start
        for tensors in islice(self._stream(), start, None):
            self._batches += 1
            yield as_batch(tensors, self.schema)

    def _identity(self) -> dict[str, Any]:
        names = "".join(f"{unit.path.name}:{unit.index}:{unit.rows};" for unit in self._units)
        settings = ("rank", "world_size", "workers", "batch_size", "seed", "shuffle", "shuffle_buffer")
        return {
            **{name: getattr(self, name) for name in settings},
            "files": hashlib.sha256(names.encode()).hexdigest()[:16],
        }

    def _stream(self) -> Iterator[list[Tensor]]:
        order = np.arange(len(self._units))
        if self.shuffle:
            order = np.random.default_rng([self.seed, self._epoch]).permutation(order)
        units = _deal([self._units[i] for i in order], self.world_size)[self.rank]
        if not self.workers:
            yield from self._read(units, 0)
            return
        share = _Share(self, _deal(units, self.workers))
        how = {
            "num_workers": self.workers,
            "pin_memory": self.pinned,
            "worker_init_fn": _share_by_name,
            "multiprocessing_context": "fork",  # such a worker ends with its rank, one of a fork server never
            "generator": torch.Generator(),  # otherwise the loader would draw from, and so change, the model's
        }
        for item in DataLoader(share, batch_size=None, **how):
            if isinstance(item, InputError):
                raise item
            yield item

    def _read(self, units: list[RowGroup], worker: int) -> Iterator[list[Tensor]]:
        """Fill a buffer with units, permute its rows, cut batches; what is left goes to the next buffer."""
        rng = np.random.default_rng([self.seed, self._epoch, self.rank, worker])
        wanted = max(self.batch_size, self.shuffle_buffer if self.shuffle else 0)
        tables: list[Table] = []
        for position, unit in enumerate(units):
            tables.append(read_row_group(unit, self._footers[unit.path], self.schema))
            is_last = position == len(units) - 1
            if sum(map(len, tables)) < wanted and not is_last:
                continue
            table = Table.concatenate(tables)
            rows = rng.permutation(len(table)) if self.shuffle else np.arange(len(table))
            starts, used = table.starts(), 0
            while len(rows) - used >= self.batch_size or (is_last and used < len(rows)):
                batch = table.take(rows[used : used + self.batch_size], starts)
                yield batch.tensors(self.schema.sparse_keys)
                used += len(batch)
            tables = [table.take(rows[used:], starts)]


class _Share(IterableDataset):
    """What runs inside a reader worker: its share of the units. An InputError travels as an item, message intact."""

    def __init__(self, reader: ParquetReader, shares: list[list[RowGroup]]) -> None:
        self.reader, self.shares = reader, shares

    def __iter__(self) -> Iterator[list[Tensor] | InputError]:
        worker = get_worker_info().id
        try:
            yield from self.reader._read(self.shares[worker], worker)
        except InputError as error:
            yield error


def _share_by_name(worker: int) -> None:
    """Tensors of a worker go by name: a descriptor for each is a connection, and time of the process that trains."""
    torch.multiprocessing.set_sharing_strategy("file_system")


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder; prepare the data first or correct data.path")
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise InputError(f"{folder}: holds no *.parquet file; prepare the data first or correct data.path")
    return files


def _deal(units: list[RowGroup], shares: int) -> list[list[RowGroup]]:
    """Split units into lists with about equal rows, largest units first; each list keeps the given order."""
    rows, taken = [0] * shares, [[] for _ in range(shares)]
    for position in sorted(range(len(units)), key=lambda i: -units[i].rows):
        least = rows.index(min(rows))
        rows[least] += units[position].rows
        taken[least].append(position)
    return [[units[position] for position in sorted(positions)] for positions in taken]
