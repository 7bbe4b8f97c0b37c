"""The values' optimizer as TorchRec sees it: the update runs in the backward, this holds its state."""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import DTensor
from torchrec.optim.fused import FusedOptimizer

from msn_dist.sharding.lookup import Lookup


class ValueFusedOptimizer(FusedOptimizer):
    """Row-wise Adagrad inside a lookup's backward.

    Change ``param_groups[0]["lr"]``, then `step` hands it to the lookup.  The state holds the
    accumulator as a DTensor [n], so it is saved and resharded with the table.
    """

    def __init__(self, lookup: Lookup, weight: DTensor, moment: DTensor) -> None:
        self._lookup = lookup
        group = {"params": [weight], "lr": lookup.optimizer.learning_rate}
        super().__init__({"weight": weight}, {weight: {"moment": moment}}, [group])

    def step(self, closure: Any = None) -> None:
        """Pass a changed learning rate on; the update itself has run in the backward."""
        self._lookup.set_learning_rate(self.param_groups[0]["lr"])

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Nothing to clear: the gradient of the values never exists."""
