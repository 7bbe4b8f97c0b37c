"""The optimizer of the values: its kind and numbers, and what it keeps of the rows.

The formulas are in kernels/reference.py.  Shape suffixes: R rows on this rank, D value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from msn_dist.config import ValueOptimizerKind
from msn_dist.errors import InputError


@dataclass(frozen=True)
class ValueOptimizer:
    """The fused optimizer of the values; rows that a step does not hit are left alone, and so is their state.

    No weight decay: FBGEMM's CPU kernel takes the option and ignores it.  InputError for a kind that there is not.
    """

    learning_rate: float = 0.01
    eps: float = 1e-8  # of rowwise_adagrad and rowwise_adam
    kind: ValueOptimizerKind = "rowwise_adagrad"
    beta1: float = 0.9  # of rowwise_adam, as is the next
    beta2: float = 0.999

    def __post_init__(self) -> None:
        kinds = get_args(ValueOptimizerKind)
        if self.kind not in kinds:
            raise InputError(f"ValueOptimizer(kind={self.kind!r}): no such kind; use one of {', '.join(kinds)}")


@dataclass
class ValueState:
    """What an optimizer keeps from step to step; a kind has some of these, and sgd has none."""

    moment_R: Tensor | None = None  # float32; rowwise_adagrad: sum, rowwise_adam: mean of the rows' mean squares
    first_RD: Tensor | None = None  # float32; rowwise_adam: mean of the gradients
    steps: Tensor | None = None  # int64 [], on the CPU; rowwise_adam: how many there were

    @classmethod
    def of(cls, kind: ValueOptimizerKind, rows: int, dim: int, device: torch.device) -> ValueState:
        """That of the start: zeros."""
        match kind:
            case "sgd":
                return cls()
            case "rowwise_adagrad":
                return cls(torch.zeros(rows, device=device))
            case "rowwise_adam":
                return cls(torch.zeros(rows, device=device), torch.zeros(rows, dim, device=device), no_steps())

    def next_step(self) -> int:
        """Count a step of training, which updates once however many chunks it has; its number from 1.

        0 for a kind that does not count.
        """
        if self.steps is None:
            return 0
        self.steps += 1
        return int(self.steps)


def no_steps() -> Tensor:
    return torch.zeros((), dtype=torch.int64)


def state_bytes(kind: ValueOptimizerKind, dim: int) -> int:
    """Bytes of a row's state in `ValueState`."""
    return {"sgd": 0, "rowwise_adagrad": 4, "rowwise_adam": 4 + 4 * dim}[kind]
