"""The values' optimizer as TorchRec sees it: the update runs in the backward, this holds its state."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torchrec.optim.fused import FusedOptimizer

from msn_dist.sharding.lookup import Lookup


class ValueFusedOptimizer(FusedOptimizer):
    """The step inside a lookup's backward.

    Change ``param_groups[0]["lr"]``, then `step` hands it to the lookup.  The state holds DTensors, "moment" [n]
    and "first_moment" [n, D], so that they are saved and resharded with the table, and "step", how many there were
    (int64 []), as far as the kind has them; sgd has no state.
    """

    def __init__(self, lookup: Lookup, weight: DTensor, state: dict[str, Tensor]) -> None:
        self._lookup = lookup
        group = {"params": [weight], "lr": lookup.optimizer.learning_rate}
        super().__init__({"weight": weight}, {weight: state} if state else {}, [group])

    def step(self, closure: Any = None) -> None:
        """Pass a changed learning rate on; the update itself has run in the backward."""
        self._lookup.set_learning_rate(self.param_groups[0]["lr"])

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Nothing to clear: the gradient of the values never exists."""
