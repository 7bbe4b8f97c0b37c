"""Three learning rates on one schedule: dense parameters (AdamW), id tables and memory values (fused)."""

from __future__ import annotations

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.fused import FusedOptimizerModule
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from msn_dist.config import OptimizerConfig
from msn_dist.sharding import ShardedMemoryValues


class Optimizers:
    """Steps the dense parameters, and tells the fused optimizers their rate before each step.

    `embeddings` are this rank's parts of the id tables.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        embeddings: list[torch.Tensor],
        config: OptimizerConfig,
        total_steps: int,
    ) -> None:
        self._config, self._total_steps = config, total_steps
        self._embeddings = embeddings
        self._dense_parameters = dict(in_backward_optimizer_filter(model.named_parameters()))
        self.dense = KeyedOptimizerWrapper(self._dense_parameters, self._adamw)
        fused = [module for module in model.module.modules() if isinstance(module, FusedOptimizerModule)]
        self._values = [module.fused_optimizer for module in fused if isinstance(module, ShardedMemoryValues)]
        self._ids = [module.fused_optimizer for module in fused if not isinstance(module, ShardedMemoryValues)]

    def _adamw(self, parameters: list[torch.Tensor]) -> torch.optim.AdamW:
        decaying = {parameter for name, parameter in self._dense_parameters.items() if _decays(name, parameter)}
        groups = [
            {"params": [p for p in parameters if p in decaying], "weight_decay": self._config.dense.weight_decay},
            {"params": [p for p in parameters if p not in decaying], "weight_decay": 0.0},
        ]
        fused = all(parameter.device.type == "cuda" for parameter in parameters)  # else one pass for every operation
        return torch.optim.AdamW([group for group in groups if group["params"]], lr=self._config.dense.lr, fused=fused)

    def set_rates(self, step: int) -> float:
        """Set all rates for step `step` (from 0) before its forward; returns the dense one."""
        dense, ids, values = self.rates(step)
        if self._config.ids.decay and step % self._config.ids.decay_every == 0:
            self._forget(ids / self._config.ids.lr)
        for optimizers, rate in (([self.dense], dense), (self._ids, ids), (self._values, values)):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
        for optimizer in (*self._ids, *self._values):
            optimizer.step()  # hands the rate to the kernel; the update itself runs in the backward
        return dense

    def rates(self, step: int) -> tuple[float, float, float]:
        """Learning rates (dense, ids, values) of step `step`.

        Warm-up is linear from 0.1 %; the values' multiplier moves linearly from `multiplier` at the first
        step to `final_multiplier` at the last.
        """
        config = self._config
        progress = min(1.0, step / max(1, self._total_steps - 1))
        factor = 1.0
        if step < config.warmup_steps:
            factor = 0.001 + 0.999 * step / config.warmup_steps
        elif config.schedule == "linear":
            remaining = self._total_steps - config.warmup_steps
            factor = max(0.0, (self._total_steps - step) / max(1, remaining))
        first = config.values.multiplier
        last = first if config.values.final_multiplier is None else config.values.final_multiplier
        multiplier = first + (last - first) * progress
        dense = factor * config.dense.lr
        return dense, factor * config.ids.lr, dense * multiplier

    @torch.no_grad()
    def _forget(self, factor: float) -> None:
        """Decoupled weight decay of all embeddings, in proportion to the schedule.

        FBGEMM's own weight decay reaches the rows that a step reads only, and on a CPU not even those.
        """
        if self._embeddings:  # a rank may hold no table
            torch._foreach_mul_(self._embeddings, (1 - self._config.ids.decay * factor) ** self._config.ids.decay_every)

    def step(self) -> None:
        """Clip the dense gradients, which are the same on every rank, and step."""
        if self._config.dense.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._dense_parameters.values(), self._config.dense.clip_norm)
        self.dense.step()

    def make_state(self) -> None:
        """Let AdamW make its state, which it else does in the first step, so that a checkpoint can be read into it."""
        for group in self.dense.param_groups:
            group["lr"] = 0.0  # this step is to change nothing; `set_rates` comes before the next one
        self.dense.init_state()
        self.zero_grad()

    def zero_grad(self) -> None:
        self.dense.zero_grad(set_to_none=True)


def _decays(name: str, parameter: torch.Tensor) -> bool:
    """Matrices decay; biases and norms do not, nor do memory keys, whose scale a norm takes out again."""
    return parameter.ndim > 1 and not name.rsplit(".", 1)[-1].startswith(("bias", "gamma", "beta", "codes", "theta"))
