"""One step's rows as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from msn_dist.data.schema import Schema


@dataclass
class Batch(Pipelineable):
    """B rows of one rank; B may differ between ranks and may be 0.

    Shape suffixes: B rows, F dense features, K tasks.
    """

    sparse: KeyedJaggedTensor  # keys are schema.sparse_keys, stride B, int64 values
    dense_BF: Tensor  # float32
    labels_BK: Tensor  # float32, NaN where a row has no such label
    groups_B: Tensor  # int64

    def __len__(self) -> int:
        return len(self.groups_B)

    @staticmethod
    def empty(schema: Schema) -> Batch:
        """A batch without rows, for a rank that has run out of data before the others."""
        sparse = KeyedJaggedTensor(
            keys=schema.sparse_keys,
            values=torch.empty(0, dtype=torch.int64),
            lengths=torch.empty(0, dtype=torch.int64),
            stride=0,
        )
        return Batch(
            sparse,
            torch.empty(0, len(schema.dense)),
            torch.empty(0, len(schema.labels)),
            torch.empty(0, dtype=torch.int64),
        )

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return Batch(
            self.sparse.to(device, non_blocking=non_blocking),
            self.dense_BF.to(device, non_blocking=non_blocking),
            self.labels_BK.to(device, non_blocking=non_blocking),
            self.groups_B.to(device, non_blocking=non_blocking),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        for part in (self.sparse, self.dense_BF, self.labels_BK, self.groups_B):
            part.record_stream(stream)

    def pin_memory(self) -> Batch:
        return Batch(
            self.sparse.pin_memory(),
            self.dense_BF.pin_memory(),
            self.labels_BK.pin_memory(),
            self.groups_B.pin_memory(),
        )
