"""This rank's part of a table as torch.distributed.checkpoint takes it: in pieces, written and read by several threads.

Given a DTensor, torch would copy all of the part to the host at once, in one thread, and number its rows in a tensor of
8 bytes each: 72 GiB for 2^30 rows of 64 bytes.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    LoadPlan,
    LoadPlanner,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import ReadItem, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Shard
from torch.futures import Future
from torch.utils._pytree import tree_map

PIECE = 2**27  # bytes


@dataclass(frozen=True)
class Part:
    """Pieces of a tensor of `shape`, by the offsets at which they begin in it; no two of them overlap.

    The names with underscores are those that torch asks a tensor for.
    """

    shape: torch.Size
    pieces: dict[torch.Size, Tensor]
    shared: bool = False  # every rank has the same pieces, of which torch writes one rank's

    @staticmethod
    def of(whole: DTensor) -> Part:
        """In the same memory."""
        pieces = {offset: piece for shard in _shards(whole) for offset, piece in _cut(*shard)}
        return Part(whole.size(), pieces, shared=all(place.is_replicate() for place in whole.placements))

    @property
    def bytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces.values())

    def on_host(self) -> Part:
        """A copy."""
        pieces = {offset: piece.to("cpu", copy=True) for offset, piece in self.pieces.items()}
        return replace(self, pieces=pieces)

    def size(self) -> torch.Size:
        return self.shape

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties.create_from_tensor(piece), self.shape),
            )
            for chunk, piece in zip(self.__create_chunk_list__(), self.pieces.values(), strict=True)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offset, piece.size()) for offset, piece in self.pieces.items()]


def in_parts(tree: Any) -> Any:
    """A state with a Part for every DTensor, in the same memory."""
    return tree_map(lambda leaf: Part.of(leaf) if isinstance(leaf, DTensor) else leaf, tree)


def _shards(whole: DTensor) -> Iterator[tuple[torch.Size, Tensor]]:
    """(offset, shard) of this rank: TorchRec's, or the one block of an own table."""
    local = whole.to_local()
    if hasattr(local, "local_shards"):
        # not strict: where there is no shard, TorchRec has an offset all the same
        yield from zip(map(torch.Size, local.local_offsets()), local.local_shards(), strict=False)
        return
    offset = [0] * whole.ndim
    for size, rank, place in zip(
        whole.device_mesh.shape, whole.device_mesh.get_coordinate(), whole.placements, strict=True
    ):
        if isinstance(place, Shard):  # of blocks of ceil(n / W)
            offset[place.dim] = min(rank * -(-whole.size(place.dim) // size), whole.size(place.dim))
    yield torch.Size(offset), local


def _cut(offset: torch.Size, shard: Tensor) -> Iterator[tuple[torch.Size, Tensor]]:
    """By rows, into pieces of at most PIECE bytes."""
    first, *beside = offset
    rows = max(1, PIECE // max(1, math.prod(shard.shape[1:]) * shard.element_size()))
    for start in range(0, len(shard), rows):
        yield torch.Size([first + start, *beside]), shard[start : start + rows]


class SaveParts(DefaultSavePlanner):
    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict, storage_meta, is_coordinator)
        self.state_dict = in_parts(self.state_dict)

    def lookup_object(self, index: MetadataIndex) -> Any:
        kept = self.state_dict[index.fqn]
        return kept.pieces[index.offset] if isinstance(kept, Part) else super().lookup_object(index)


class LoadParts(DefaultLoadPlanner):
    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict, metadata, is_coordinator)  # which drops what it does not know
        self.state_dict = in_parts(self.state_dict)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        kept = self.state_dict[index.fqn]
        return kept.pieces[index.offset] if isinstance(kept, Part) else super().lookup_tensor(index)


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

        def read_file(name: str, items: list[ReadItem]) -> None:
            try:
                read(replace(plan, items=items), planner).wait()
            except torch.OutOfMemoryError:  # no fault of the file
                raise
            except (RuntimeError, EOFError, UnpicklingError) as error:
                why = str(error).partition("\n")[0] or type(error).__name__
                raise OSError(f"{Path(self.path, name)} is truncated or damaged: {why}") from error

        with ThreadPoolExecutor(self._count) as pool:
            parts = [pool.submit(read_file, name, items) for name, items in items_of.items()]
        for part in parts:
            part.result()
        return read(replace(plan, items=[]), planner)
