"""Local back ends of the sharded table: weighted bags, and row-wise Adagrad from their gradient.

`reference` is here; `fbgemm` and `triton` have files of their own, which are imported where they are chosen.

Shape suffixes: R rows on this rank, D value width, G bags, H hits, U rows that were hit.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from msn_dist.errors import InputError
from msn_dist.kernels import reference
from msn_dist.kernels.support import interpreted, why_no_triton

if TYPE_CHECKING:
    from msn_dist.sharding.hits import Hits


@dataclass(frozen=True)
class ValueOptimizer:
    """Row-wise Adagrad, the fused optimizer of the values.

    No weight decay: FBGEMM's CPU kernel takes the option and ignores it.
    """

    learning_rate: float = 0.01
    eps: float = 1e-8


class Lookup(Protocol):
    """A table on one device, with its optimizer."""

    name: str  # as in MemoryConfig.lookup
    weight_RD: Tensor
    moment_R: Tensor
    anchor: Tensor  # requires a gradient, so that backward comes here even if no weight does
    optimizer: ValueOptimizer

    def read(self, hits: Hits, update_follows: bool = False) -> Tensor:
        """pooled_GD, float32: the weighted sum of each bag's rows."""
        ...

    def update(self, hits: Hits, gradient_GD: Tensor, of_weights: bool = True) -> Tensor | None:
        """Step the rows of a `read`; returns the gradient of its weights [H], float32, or None."""
        ...

    def set_learning_rate(self, learning_rate: float) -> None: ...


class ReferenceLookup:
    """PyTorch only; the gradient of the values exists for the touched rows alone.

    `mean_square` maps gradient_UD to the mean squares [U] that row-wise Adagrad adds up: where a rank holds some
    columns of a row only, they come from all ranks.
    """

    name = "reference"

    def __init__(
        self,
        rows: int,
        dim: int,
        optimizer: ValueOptimizer,
        device: torch.device,
        mean_square: Callable[[Tensor], Tensor] = reference.mean_square,
    ) -> None:
        self.optimizer = optimizer
        self.learning_rate = optimizer.learning_rate
        self.weight_RD = torch.empty(rows, dim, device=device)
        self.moment_R = torch.zeros(rows, device=device)
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self._mean_square = mean_square

    def read(self, hits: Hits, update_follows: bool = False) -> Tensor:
        if hits.weights_H is None:
            return self.weight_RD[hits.rows_H]
        return reference.weighted_bags(self.weight_RD, hits.rows_H, hits.offsets_G1, hits.weights_H)

    def update(self, hits: Hits, gradient_GD: Tensor, of_weights: bool = True) -> Tensor | None:
        gradient_HD, gradient_H = gradient_GD, None
        if hits.weights_H is not None:
            if of_weights:
                gradient_H = weights_gradient(self.weight_RD, hits, gradient_GD)
            gradient_HD = gradient_GD.repeat_interleave(hits.offsets_G1.diff(), dim=0) * hits.weights_H[:, None]
        touched_U, where_H = torch.unique(hits.rows_H, return_inverse=True)
        gradient_UD = gradient_GD.new_zeros(len(touched_U), gradient_GD.shape[1])
        gradient_UD.index_add_(0, where_H, gradient_HD)
        self.step_rows(touched_U, gradient_UD)
        return gradient_H

    def step_rows(self, rows_U: Tensor, gradient_UD: Tensor) -> None:
        """One step of distinct rows."""
        weight_UD, moment_U = self.weight_RD[rows_U], self.moment_R[rows_U]
        reference.rowwise_adagrad_(
            weight_UD, moment_U, gradient_UD, self.learning_rate, self.optimizer.eps, self._mean_square(gradient_UD)
        )
        self.weight_RD[rows_U], self.moment_R[rows_U] = weight_UD, moment_U

    def set_learning_rate(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate


def weights_gradient(values_RD: Tensor, hits: Hits, gradient_GD: Tensor) -> Tensor:
    """`reference.weights_gradient`, without its temporaries [H, D]: what `embedding_bag` runs in its backward."""
    lengths_G = hits.offsets_G1.diff()
    bag_H = torch.arange(len(lengths_G), device=lengths_G.device).repeat_interleave(lengths_G)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        gradient_GD.contiguous(), values_RD, hits.rows_H.long(), hits.offsets_G1[:-1], bag_H, 0
    )


LOOKUPS = ("reference", "fbgemm", "triton")
_WIDEST = 4096  # columns that the Triton kernels take


def choose_lookup(kind: str, device: torch.device, dim: int) -> str:
    """Which of LOOKUPS serves rows of width `dim` on `device`; `kind` is one of them or "auto".

    auto is triton on a GPU that its kernels run on, else fbgemm, or reference where that is not installed.
    Raises InputError if `kind` cannot run here.
    """
    too_wide = f"the kernels take values up to {_WIDEST} wide, and these are {dim}" if dim > _WIDEST else None
    reasons = {"triton": why_no_triton(device) or too_wide, "fbgemm": _why_no_fbgemm()}
    if kind == "auto":
        on_gpu = device.type == "cuda" and not interpreted()
        if on_gpu and reasons["triton"] is None:
            return "triton"
        return "fbgemm" if reasons["fbgemm"] is None else "reference"
    if reason := reasons.get(kind):
        raise InputError(f"memory.lookup={kind}: {reason}; set memory.lookup to auto or reference")
    return kind


def make_lookup(kind: str, rows: int, dim: int, optimizer: ValueOptimizer, device: torch.device) -> Lookup:
    """The look-up that `choose_lookup` names, over `rows` rows of width `dim` whose values are yet to be filled in."""
    match choose_lookup(kind, device, dim):
        case "triton":
            from msn_dist.sharding.triton_lookup import TritonLookup as Chosen
        case "fbgemm":
            from msn_dist.sharding.fbgemm_lookup import FbgemmLookup as Chosen
        case _:
            Chosen = ReferenceLookup
    return Chosen(rows, dim, optimizer, device)


def _why_no_fbgemm() -> str | None:
    return None if importlib.util.find_spec("fbgemm_gpu") else "FBGEMM is not installed"
