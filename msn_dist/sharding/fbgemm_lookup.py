"""The look-up by FBGEMM. This module alone imports it for the memory.

Shape suffixes: R rows on this rank, D value width, G bags, H hits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from msn_dist.sharding.lookup import OnDevice
from msn_dist.sharding.value_optimizer import ValueOptimizer, ValueState, no_steps

if TYPE_CHECKING:
    from msn_dist.sharding.hits import Hits


_OPTIMIZERS = {
    "sgd": EmbOptimType.EXACT_SGD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "rowwise_adam": EmbOptimType.PARTIAL_ROWWISE_ADAM,  # on a GPU only
}


class FbgemmLookup(OnDevice):
    """FBGEMM's table-batched embedding (TBE) with one table, which updates its rows in its own backward.

    It rounds float16 at random by torch's global generator of the GPU.
    """

    name = "fbgemm"

    def __init__(
        self,
        rows: int,
        dim: int,
        optimizer: ValueOptimizer,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        location: EmbeddingLocation = EmbeddingLocation.DEVICE,
        **placing: Any,
    ) -> None:
        """`location` is that on a GPU, and `placing` what else TBE is told of it."""
        self.optimizer = optimizer
        on_cpu = device.type == "cpu"
        location = EmbeddingLocation.HOST if on_cpu else location
        compute = ComputeDevice.CPU if on_cpu else ComputeDevice.CUDA
        self._tbe = SplitTableBatchedEmbeddingBagsCodegen(
            [(rows, dim, location, compute)],
            device=device,
            weights_precision=SparseType.from_dtype(dtype),
            optimizer=_OPTIMIZERS[optimizer.kind],
            learning_rate=optimizer.learning_rate,
            eps=optimizer.eps,
            beta1=optimizer.beta1,
            beta2=optimizer.beta2,
            **placing,
        )
        (self.weight_RD,) = self._tbe.split_embedding_weights()
        self.state = self._state()
        self.anchor = torch.zeros((), device=device, requires_grad=True)

    def _state(self) -> ValueState:
        """TBE's own tensors, and the number of steps, as TBE counts every read."""
        kept = [state for of_table in self._tbe.split_optimizer_states() for state in of_table]  # there is one table
        match self.optimizer.kind:
            case "sgd":
                return ValueState()
            case "rowwise_adagrad":
                return ValueState(*kept)
            case "rowwise_adam":
                first_RD, moment_R = kept
                return ValueState(moment_R, first_RD, no_steps())

    def read(self, hits: Hits, update_follows: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
        if not update_follows:
            return self._tbe(*self._bags(hits), hits.weights_H).to(dtype)
        hits.tape = self._recorded(hits, of_weights=True)
        return hits.tape[1].detach().to(dtype)

    def _recorded(self, hits: Hits, of_weights: bool) -> tuple[Tensor | None, Tensor]:
        """(weights_H, pooled_GD) whose graph leads to TBE's own backward."""
        if self.state.steps is not None:  # the graph keeps the number of its step
            for counter in (self._tbe.iter_cpu, self._tbe.iter):
                counter.fill_(int(self.state.steps))
        with torch.enable_grad():
            weights_H = None if hits.weights_H is None else hits.weights_H.detach().requires_grad_(of_weights)
            return weights_H, self._tbe(*self._bags(hits), weights_H)

    def _bags(self, hits: Hits) -> tuple[Tensor, Tensor]:
        """Rows and offsets, of one dtype."""
        return hits.rows_H, hits.offsets_G1.to(hits.rows_H.dtype)

    def update(self, hits: Hits, gradient_GD: Tensor, of_weights: bool = True) -> Tensor | None:
        weights_H, pooled_GD = hits.tape or self._recorded(hits, of_weights)
        hits.tape = None
        pooled_GD.backward(gradient_GD.float())
        self.state.next_step()
        return None if weights_H is None else weights_H.grad

    def set_learning_rate(self, learning_rate: float) -> None:
        self._tbe.set_learning_rate(learning_rate)
