"""A rank's part of a table is written in pieces of at most 256 MiB, and read so, by several threads.

Whatever torch writes from a GPU, or reads to one, is whole in the host's memory meanwhile: a part of 64 GiB would take
64 GiB of it, and one thread alone could work at it.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, LoadPlan, LoadPlanner, SavePlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.futures import Future

PIECE = 2**28  # bytes


def threads(local_world: int) -> int:
    """That a rank writes and reads with, a file each; more than four hold each other up."""
    return max(1, min(4, (os.cpu_count() or 1) // local_world))


class ByThreads(FileSystemReader):
    """Reads the files of a checkpoint side by side, where the base class goes through them one by one."""

    def __init__(self, path: os.PathLike, count: int) -> None:
        super().__init__(path)
        self._count = count

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        items_of = defaultdict(list)
        for item in plan.items:
            items_of[self.storage_data[item.storage_index].relative_path].append(item)
        read = super().read_data
        with ThreadPoolExecutor(self._count) as pool:
            parts = [pool.submit(read, replace(plan, items=items), planner) for items in items_of.values()]
        for part in parts:
            part.result()
        return read(replace(plan, items=[]), planner)


class InPieces(DefaultSavePlanner):
    """Cuts by rows; readers see a tensor of more shards."""

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self._cut: dict[MetadataIndex, tuple[MetadataIndex, int, int]] = {}  # piece: (its part, first row, rows)
        self.plan = replace(plan, items=[piece for item in plan.items for piece in self._pieces(item)])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        if index not in self._cut:
            return super().lookup_object(index)
        part, first_row, rows = self._cut[index]
        return super().lookup_object(part).narrow(0, first_row, rows)

    def _pieces(self, item: WriteItem) -> list[WriteItem]:
        if item.type is not WriteItemType.SHARD:
            return [item]
        data = item.tensor_data
        rows, *width = data.chunk.sizes
        most = max(1, PIECE // (math.prod(width) * data.properties.dtype.itemsize))
        if rows <= most:
            return [item]
        pieces = []
        for first_row in range(0, rows, most):
            taken = min(most, rows - first_row)
            offsets = torch.Size([data.chunk.offsets[0] + first_row, *data.chunk.offsets[1:]])
            index = MetadataIndex(item.index.fqn, offsets)
            self._cut[index] = item.index, first_row, taken
            chunk = ChunkStorageMetadata(offsets, torch.Size([taken, *width]))
            pieces.append(replace(item, index=index, tensor_data=replace(data, chunk=chunk)))
        return pieces
