"""Local back ends of the sharded table: weighted bags forward, row-wise Adagrad inside the backward.

Shape suffixes: R rows on this rank, D value width, G bags, H hits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from msn_dist.kernels import reference


@dataclass(frozen=True)
class ValueOptimizer:
    """Row-wise Adagrad, the fused optimizer of the values.

    No weight decay: FBGEMM's CPU kernel takes the option and ignores it.
    """

    learning_rate: float = 0.01
    eps: float = 1e-8


class ReferenceLookup:
    """PyTorch only; the gradient of the values exists for the touched rows alone."""

    def __init__(self, rows: int, dim: int, optimizer: ValueOptimizer, device: torch.device) -> None:
        self.optimizer = optimizer
        self.learning_rate = optimizer.learning_rate
        self.weight_RD = torch.empty(rows, dim, device=device)
        self.moment_R = torch.zeros(rows, device=device)
        self._anchor = torch.zeros((), device=device, requires_grad=True)  # so that backward runs with fixed weights

    def __call__(self, rows_H: Tensor, offsets_G1: Tensor, weights_H: Tensor) -> Tensor:
        """pooled_GD, float32; its backward updates the rows and sends gradients to the weights."""
        return _ReferenceBags.apply(weights_H, self._anchor, rows_H.long(), offsets_G1.long(), self)

    def set_learning_rate(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate


class _ReferenceBags(Function):
    @staticmethod
    def forward(ctx, weights_H, anchor, rows_H, offsets_G1, lookup):
        ctx.save_for_backward(weights_H, rows_H, offsets_G1)
        ctx.lookup = lookup
        return reference.weighted_bags(lookup.weight_RD, rows_H, offsets_G1, weights_H)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_GD):
        weights_H, rows_H, offsets_G1 = ctx.saved_tensors
        lookup = ctx.lookup
        gradient_HD = gradient_GD.repeat_interleave(offsets_G1.diff(), dim=0)
        gradient_H = (gradient_HD * lookup.weight_RD[rows_H]).sum(1).to(weights_H.dtype)
        touched_U, where_H = torch.unique(rows_H, return_inverse=True)
        gradient_UD = gradient_GD.new_zeros(len(touched_U), gradient_GD.shape[1])
        gradient_UD.index_add_(0, where_H, gradient_HD * weights_H[:, None])
        weight_UD, moment_U = lookup.weight_RD[touched_U], lookup.moment_R[touched_U]
        reference.rowwise_adagrad_(weight_UD, moment_U, gradient_UD, lookup.learning_rate, lookup.optimizer.eps)
        lookup.weight_RD[touched_U], lookup.moment_R[touched_U] = weight_UD, moment_U
        return gradient_H, None, None, None, None


class FbgemmLookup:
    """FBGEMM's table-batched embedding (TBE) with one table."""

    def __init__(self, rows: int, dim: int, optimizer: ValueOptimizer, device: torch.device) -> None:
        self.optimizer = optimizer
        on_cpu = device.type == "cpu"
        location = EmbeddingLocation.HOST if on_cpu else EmbeddingLocation.DEVICE
        compute = ComputeDevice.CPU if on_cpu else ComputeDevice.CUDA
        self._tbe = SplitTableBatchedEmbeddingBagsCodegen(
            [(rows, dim, location, compute)],
            device=device,
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=optimizer.learning_rate,
            eps=optimizer.eps,
        )
        (self.weight_RD,) = self._tbe.split_embedding_weights()
        ((self.moment_R,),) = self._tbe.split_optimizer_states()

    def __call__(self, rows_H: Tensor, offsets_G1: Tensor, weights_H: Tensor) -> Tensor:
        """pooled_GD, float32; its backward updates the rows and sends gradients to the weights."""
        return self._tbe(rows_H, offsets_G1.to(rows_H.dtype), weights_H)

    def set_learning_rate(self, learning_rate: float) -> None:
        self._tbe.set_learning_rate(learning_rate)


LOOKUPS = {"fbgemm": FbgemmLookup, "reference": ReferenceLookup}
