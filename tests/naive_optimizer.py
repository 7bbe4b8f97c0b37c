"""The optimizer of the values by the naive formulas, for tests of the look-ups and of the sharded memory."""

from __future__ import annotations

import torch
from torch import Tensor

from msn_dist.kernels import reference
from msn_dist.sharding import ValueOptimizer

KINDS = ("rowwise_adagrad", "sgd", "rowwise_adam")


def optimizer_of(kind: str) -> ValueOptimizer:
    """With numbers that tell in a few steps."""
    return ValueOptimizer(0.3, kind=kind, **({"beta1": 0.8, "beta2": 0.9} if kind == "rowwise_adam" else {}))


class NaiveOptimizer:
    """`state` has the names of a checkpoint."""

    def __init__(self, optimizer: ValueOptimizer, values_RD: Tensor) -> None:
        self.optimizer = optimizer
        self.state: dict[str, Tensor] = {}
        if optimizer.kind != "sgd":
            self.state["moment"] = torch.zeros_like(values_RD[:, 0])
        if optimizer.kind == "rowwise_adam":
            self.state |= {"first_moment": torch.zeros_like(values_RD), "step": torch.tensor(0)}

    def step(self, values_RD: Tensor, gradient_RD: Tensor, rows_H: Tensor, rate: float | None = None) -> None:
        """In place, for the rows of rows_H, which are hits and may repeat."""
        optimizer, state, rows_X = self.optimizer, self.state, rows_H.unique().long()
        rate = optimizer.learning_rate if rate is None else rate
        values_XD, gradient_XD = values_RD[rows_X], gradient_RD[rows_X]
        rows = {name: state[name][rows_X] for name in ("moment", "first_moment") if name in state}
        match optimizer.kind:
            case "sgd":
                reference.sgd_(values_XD, gradient_XD, rate)
            case "rowwise_adagrad":
                reference.rowwise_adagrad_(values_XD, rows["moment"], gradient_XD, rate, optimizer.eps)
            case "rowwise_adam":
                state["step"] += 1
                numbers = rate, optimizer.eps, optimizer.beta1, optimizer.beta2, int(state["step"])
                reference.rowwise_adam_(values_XD, rows["first_moment"], rows["moment"], gradient_XD, *numbers)
        values_RD[rows_X] = values_XD
        for name, of_rows in rows.items():
            state[name][rows_X] = of_rows
