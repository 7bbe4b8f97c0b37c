"""A rank's part of a table is written in pieces of at most 1 GiB.

Whatever torch writes from a GPU, or reads to one, is whole in the host's memory meanwhile: a part of 64 GiB would take
64 GiB of it, and no two threads could work at it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

PIECE = 2**30  # bytes


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
