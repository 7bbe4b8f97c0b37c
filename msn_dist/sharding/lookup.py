"""Local back ends of the sharded table: weighted bags, and a step of the optimizer from their gradient.

`reference` is here; `fbgemm` and `triton` have files of their own, which are imported where they are chosen.

Shape suffixes: R rows on this rank, D value width, G bags, H hits, U rows that were hit, X rows that are stepped.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from msn_dist.config import ValueOptimizerKind
from msn_dist.errors import InputError
from msn_dist.kernels import reference, sizes
from msn_dist.kernels.support import interpreted, why_no_triton
from msn_dist.sharding.rounding import round_at_random
from msn_dist.sharding.sums import Sums, TorchSums
from msn_dist.sharding.value_optimizer import ValueOptimizer, ValueState

if TYPE_CHECKING:
    from msn_dist.sharding.hits import Hits


class Lookup(Protocol):
    """A table on one device, with its optimizer.

    Sums and steps are float32, and so are the moments, whatever the values are; a 16-bit value that has been stepped is
    rounded at random, by other random numbers in every step.
    """

    name: str  # as in MemoryConfig.lookup
    tier: str  # as in MemoryConfig.tier: where weight_RD lies
    weight_RD: Tensor  # float32, bfloat16 or float16
    state: ValueState
    anchor: Tensor  # requires a gradient, so that backward comes here even if no weight does
    optimizer: ValueOptimizer

    def read(self, hits: Hits, update_follows: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
        """pooled_GD: the weighted sum of each bag's rows, rounded to `dtype`."""
        ...

    def update(self, hits: Hits, gradient_GD: Tensor, of_weights: bool = True) -> Tensor | None:
        """Step the rows of a `read`; returns the gradient of its weights [H], float32, or None.

        gradient_GD may be rounded as what was read is.
        """
        ...

    def set_learning_rate(self, learning_rate: float) -> None: ...

    def settle(self) -> None:
        """To be called before weight_RD is read or written past the look-up."""
        ...


class OnDevice:
    """Of look-ups that have no other copy of a row than that in weight_RD."""

    tier = "device"

    def settle(self) -> None:
        """Nothing to do."""


class ReferenceLookup(OnDevice):
    """A step by PyTorch, and `sums` by it too, if no others are given; it is the truth that others are compared with.

    The gradient of the values exists for the touched rows alone.
    `mean_square` maps gradient_XD to the mean squares [X] that row-wise moments are made of: where a rank holds some
    columns of a row only, they come from all ranks.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        optimizer: ValueOptimizer,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        mean_square: Callable[[Tensor], Tensor] = reference.mean_square,
        sums: Sums | None = None,
    ) -> None:
        self.sums = sums or TorchSums()
        self.name = self.sums.name
        self.optimizer = optimizer
        self.learning_rate = optimizer.learning_rate
        self.weight_RD = torch.empty(rows, dim, dtype=dtype, device=device)
        self.state = ValueState.of(optimizer.kind, rows, dim, device)
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self._mean_square = mean_square
        self._random = torch.Generator(device).manual_seed(seed)

    def read(self, hits: Hits, update_follows: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.sums.pooled(self.weight_RD, hits, dtype)

    def update(self, hits: Hits, gradient_GD: Tensor, of_weights: bool = True) -> Tensor | None:
        touched_U, where_H = torch.unique(hits.rows_H, return_inverse=True)
        distinct = touched_U, where_H
        gradient_UD, gradient_H = self.sums.gradients(self.weight_RD, hits, gradient_GD, of_weights, distinct)
        self.step_rows(self.weight_RD, touched_U, gradient_UD)
        return gradient_H

    def step_rows(self, table_RD: Tensor, rows_X: Tensor | slice, gradient_XD: Tensor) -> None:
        """The step of a training step: distinct rows of the table that `state` belongs to."""
        rate, optimizer, state = self.learning_rate, self.optimizer, self.state
        if isinstance(rows_X, slice):
            weight_XD = table_RD[rows_X].to(torch.float32)
        else:
            weight_XD = self.sums.rows(table_RD, rows_X, torch.float32)
        match optimizer.kind:
            case "sgd":
                reference.sgd_(weight_XD, gradient_XD, rate)
            case "rowwise_adagrad":
                moment_X, squares_X = state.moment_R[rows_X], self._mean_square(gradient_XD)
                reference.rowwise_adagrad_(weight_XD, moment_X, gradient_XD, rate, optimizer.eps, squares_X)
                state.moment_R[rows_X] = moment_X
            case "rowwise_adam":
                first_XD, moment_X = state.first_RD[rows_X], state.moment_R[rows_X]
                numbers = rate, optimizer.eps, optimizer.beta1, optimizer.beta2, state.next_step()
                squares_X = self._mean_square(gradient_XD)
                reference.rowwise_adam_(weight_XD, first_XD, moment_X, gradient_XD, *numbers, squares_X)
                state.first_RD[rows_X], state.moment_R[rows_X] = first_XD, moment_X
        table_RD[rows_X] = round_at_random(weight_XD, table_RD.dtype, self._random)

    def set_learning_rate(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate


LOOKUPS = ("reference", "fbgemm", "triton")


def choose_lookup(
    kind: str,
    device: torch.device,
    dim: int,
    dtype: torch.dtype = torch.float32,
    optimizer: ValueOptimizerKind = "rowwise_adagrad",
    tier: str = "device",
) -> str:
    """Which of LOOKUPS serves rows of `dim` values of `dtype` on `device`; `kind` is one of them or "auto".

    auto is triton on a GPU that its kernels run on, else fbgemm, or reference where that cannot.  On a GPU the host
    `tier` is fbgemm's alone.
    Raises InputError if `kind` cannot run here.
    """
    reasons = {
        "triton": why_no_triton(device) or sizes.why_no_lookup(dim),
        "fbgemm": _why_no_fbgemm() or why_not_in_fbgemm(dtype, device, optimizer),
    }
    if tier == "host" and device.type == "cuda":
        if reason := reasons["fbgemm"]:
            raise InputError(f"memory.tier=host: {reason}; set memory.tier to device")
        return "fbgemm"
    if kind == "auto":
        on_gpu = device.type == "cuda" and not interpreted()
        if on_gpu and reasons["triton"] is None:
            return "triton"
        return "fbgemm" if reasons["fbgemm"] is None else "reference"
    if reason := reasons.get(kind):
        raise InputError(f"memory.lookup={kind}: {reason}; set memory.lookup to auto or reference")
    return kind


def make_lookup(
    kind: str,
    rows: int,
    dim: int,
    optimizer: ValueOptimizer,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    cache: float | None = None,
) -> Lookup:
    """The look-up that `choose_lookup` names, over `rows` rows of width `dim` whose values are yet to be filled in.

    `seed` is that of random rounding.  On a GPU `cache` is the share of the rows that it caches, while all lie in the
    memory of the host; None: they lie on the device.
    """
    match choose_lookup(kind, device, dim, dtype, optimizer.kind, "device" if cache is None else "host"):
        case "triton":
            from msn_dist.sharding.triton_lookup import TritonLookup

            return TritonLookup(rows, dim, optimizer, device, dtype, seed)
        case "fbgemm" if cache is not None and device.type == "cuda":
            from msn_dist.sharding.cached_lookup import CachedLookup

            return CachedLookup(rows, dim, optimizer, device, dtype, cache)
        case "fbgemm":
            from msn_dist.sharding.fbgemm_lookup import FbgemmLookup

            return FbgemmLookup(rows, dim, optimizer, device, dtype)
        case _:
            return ReferenceLookup(rows, dim, optimizer, device, dtype, seed)


def make_sums(kind: str, device: torch.device, dim: int) -> Sums:
    """Those of the kernels where `choose_lookup` takes them for `kind`, else torch's: for steps that need other ranks.

    Raises InputError if `kind` is "fbgemm", whose step is its own, or cannot run here.
    """
    if kind == "fbgemm":
        raise InputError("memory.lookup=fbgemm: steps whole rows by itself; set memory.lookup to auto")
    if choose_lookup(kind, device, dim) != "triton":
        return TorchSums()
    from msn_dist.sharding.kernel_sums import KernelSums

    return KernelSums()


def _why_no_fbgemm() -> str | None:
    return None if importlib.util.find_spec("fbgemm_gpu") else "FBGEMM is not installed"


def why_not_in_fbgemm(dtype: torch.dtype, device: torch.device, optimizer: ValueOptimizerKind) -> str | None:
    """What FBGEMM cannot do on such a device, as a clause, or None."""
    if dtype == torch.bfloat16:
        return "FBGEMM stores no values of bf16"
    if dtype == torch.float16 and device.type == "cpu":
        return "on a CPU FBGEMM rounds fp16 to the nearest, which loses small steps"
    if optimizer == "rowwise_adam" and device.type == "cpu":
        return "on a CPU FBGEMM has no rowwise_adam (optimizer.values.kind)"
    return None
