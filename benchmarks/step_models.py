"""The models that benchmarks.step trains, and one step of their training.

A step is the product's own, at W = 1: DistributedModelParallel around a RankMixer and one task, its memory values in
MemoryValuesSharder's care, bf16 autocast, mean binary cross-entropy, fused row-wise Adagrad for the values, and AdamW
(fused on a GPU) for the rest.  Features are random and lie on the device; id tables are no part of it.

Compiled, each layer goes through torch.compile: retrieval (a custom operator) and gate are in its graphs.  The sharded
look-up breaks them and is left eager: TorchRec's awaitables, and counts that the host reads, are no part of a graph.

Shape suffixes: B rows, F features side by side, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.profiler import record_function
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.optimizers import in_backward_optimizer_filter

from msn_dist.config import MemoryConfig, RankMixerConfig
from msn_dist.models.ranker import Output, in_float32
from msn_dist.models.rankmixer import RankMixer
from msn_dist.planner import make_plan
from msn_dist.sharding import MemoryValuesSharder, ShardedMemoryValues, ValueOptimizer
from msn_dist.training.evaluation import autocast
from msn_dist.training.ranks import Ranks

BATCHES = 4  # that take turns, so that no step repeats the hits of the one before
LEARNING_RATE = 1e-4

# ranges of a step; each holds what those inside it leave over
FORWARD, BACKWARD, DENSE_OPTIMIZER = "other forward", "backward", "dense optimizer"  # tokenizer, head and loss
MIXING, RETRIEVAL, GATHER, GATE, NETWORK = "mixing and norms", "memory retrieval", "memory gather", "gate", "ffn / smoe"
UPDATE = "memory update"  # inside the backward
RANGES = (FORWARD, MIXING, RETRIEVAL, GATHER, GATE, NETWORK, BACKWARD, UPDATE, DENSE_OPTIMIZER)


@dataclass(frozen=True)
class Size:
    """Names are those of RankMixerConfig and MemoryConfig; what is not here has their defaults (d_k 32, one head)."""

    batch: int = 2048
    in_width: int = 2048
    tokens: int = 16
    width: int = 1024
    layers: int = 4
    ffn_ratio: float = 2.0
    sub_keys: int = 256
    top_k: int = 32


class Variant(NamedTuple):
    block: str  # as in RankMixerConfig
    values: str = ""  # dtype of the memory's values, "" without a memory
    value_dim: int | None = None  # None: as wide as a token

    def __str__(self) -> str:
        return " ".join(str(part) for part in self if part)


class OneTask(nn.Module):
    """features_BF -> Output of one task."""

    def __init__(self, size: Size, variant: Variant, device: torch.device, **back_ends: str) -> None:
        super().__init__()
        config = RankMixerConfig(
            block=variant.block,
            tokens=size.tokens,
            width=size.width,
            layers=size.layers,
            ffn_ratio=size.ffn_ratio,
        )
        memory = None
        if config.carries_memory:
            memory = MemoryConfig(
                sub_keys=size.sub_keys,
                top_k=size.top_k,
                value_dtype=variant.values,
                value_dim=variant.value_dim,
                value_init_std=1.0,  # as large as a token, so that the output shows what was read
                **back_ends,
            )
        torch.manual_seed(0)
        with torch.device(device):  # drawing a billion weights on the host takes minutes
            self.backbone = RankMixer(config, size.in_width, memory, seed=0, device="meta")
            self.head = nn.Linear(size.width, 1)

    def forward(self, features_BF: Tensor) -> Output:
        hidden_BD, auxiliary = self.backbone(features_BF)
        return Output(in_float32(hidden_BD, self.head.weight, self.head.bias), auxiliary)


class Trainee:
    """A variant and what trains it.

    Args:
        back_ends: `retrieval` and `lookup` of MemoryConfig.
        compiler: backend of torch.compile, None for eager.
    """

    def __init__(
        self, size: Size, variant: Variant, ranks: Ranks, *, compiler: str | None = None, **back_ends: str
    ) -> None:
        self.device = ranks.device
        bare = OneTask(size, variant, ranks.device, **back_ends)
        sharders = [MemoryValuesSharder(ValueOptimizer(10 * LEARNING_RATE))]
        plan = make_plan(bare, sharders, ranks.world, ranks.local_world, ranks.device.type)
        self.model = DistributedModelParallel(
            bare, env=ranks.sharding_env(), device=ranks.device, plan=plan.sharding, sharders=sharders
        )
        self.backbone: RankMixer = self.model.module.backbone
        self.values: list[ShardedMemoryValues] = [memory.values for memory in self.backbone.memories().values()]
        self.dense: dict[str, nn.Parameter] = dict(in_backward_optimizer_filter(self.model.named_parameters()))
        self.optimizer = torch.optim.AdamW(self.dense.values(), LEARNING_RATE, fused=ranks.device.type == "cuda")
        generator = torch.Generator(ranks.device).manual_seed(1)
        shape = (BATCHES, size.batch, size.in_width)
        self._features = torch.randn(shape, generator=generator, device=ranks.device).unbind()
        drawn = torch.rand(BATCHES, size.batch, 1, generator=generator, device=ranks.device)
        self._labels = (drawn < 0.3).float().unbind()
        self._steps = 0
        self._name_look_ups()
        if compiler:
            self._compile(compiler)
        else:
            self._name_layers()

    def output(self) -> Output:
        """Of the next step's batch, with a graph if gradients are on."""
        with autocast(self.device, "bf16"):
            return self.model(self._features[self._steps % BATCHES])

    def forward(self) -> Tensor:
        """The loss: mean over the batch, and the experts' balance."""
        with named(FORWARD):
            output = self.output()
            labels_B1 = self._labels[self._steps % BATCHES]
            return binary_cross_entropy_with_logits(output.logits_BK, labels_B1) + output.auxiliary

    def backward(self, loss: Tensor) -> None:
        """Gradients of the dense parameters, and the update of the values."""
        with named(BACKWARD):
            self.optimizer.zero_grad()
            loss.backward()

    def update(self) -> None:
        """AdamW of the dense parameters."""
        with named(DENSE_OPTIMIZER):
            self.optimizer.step()
        self._steps += 1

    def step(self) -> Tensor:
        """A whole step; returns the loss before it, detached."""
        loss = self.forward()
        self.backward(loss)
        self.update()
        return loss.detach()

    def _name_look_ups(self) -> None:
        for values in self.values:
            values.forward = torch.compiler.disable(_ranged(GATHER, values.forward))
            values.lookup.update = _ranged(UPDATE, values.lookup.update)

    def _name_layers(self) -> None:
        for layer in self.backbone.layers:
            layer.forward = _ranged(MIXING, layer.forward)
            layer.network.forward = _ranged(NETWORK, layer.network.forward)
        for memory in self.backbone.memories().values():
            memory.retrieve = _ranged(RETRIEVAL, memory.retrieve)
            memory.gate.forward = _ranged(GATE, memory.gate.forward)

    def _compile(self, backend: str) -> None:
        # it cuts graphs where DistributedDataParallel may start to talk, and at W = 1 there is nobody to talk to
        torch._dynamo.config.optimize_ddp = False
        for layer in self.backbone.layers:
            layer.compile(backend=backend)


def named(name: str) -> AbstractContextManager:
    """A range while a profiler runs, else nothing: a range takes the host as long as an operator of torch."""
    return record_function(name) if torch.autograd._profiler_enabled() else nullcontext()


def _ranged(name: str, function: Callable) -> Callable:
    """The function inside a named range of the profiler."""

    @functools.wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with named(name):
            return function(*args, **kwargs)

    return inside
