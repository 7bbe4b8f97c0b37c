"""The recipe of test_sharding: a memory on one device in plain PyTorch, the same one sharded, three steps, compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv

from msn_dist.config import MemoryConfig
from msn_dist.memory import Memory, MemoryHealth
from msn_dist.planner import make_plan
from msn_dist.sharding import MemoryValuesSharder, ShardedMemoryValues, ValueOptimizer
from msn_dist.sharding.column import Column
from msn_dist.sharding.row_gather import RowGatherUnique
from naive_optimizer import NaiveOptimizer, optimizer_of

WIDTH, TOKENS = 16, 3
OPTIMIZER = optimizer_of("rowwise_adagrad")


@dataclass(frozen=True)
class Case:
    """B rows in all, dealt to the ranks by `batches`."""

    name: str
    batches: str  # "even", "uneven", "one empty", "all on rank 0"
    sub_keys: int = 9  # 81 slots: neither 2 nor 4 ranks divide them
    heads: int = 2
    repeated: bool = False  # every row is the same: the same slots are hit again and again
    gate: str = "tanh"
    share: str = "all"
    theta: str = "key"
    value_dim: int = 20  # columns of 3 ranks are uneven

    def config(self, **sharding: object) -> MemoryConfig:
        return MemoryConfig(
            sub_keys=self.sub_keys, top_k=4, heads=self.heads, key_dim=8, value_dim=self.value_dim,
            gate=self.gate, share=self.share, theta=self.theta, **sharding,
        )  # fmt: skip

    def rows_per_rank(self, world: int) -> list[int]:
        return {
            "even": [4] * world,
            "uneven": [3 + 2 * rank for rank in range(world)],
            "one empty": [0 if rank == world - 1 and world > 1 else 5 for rank in range(world)],
            "all on rank 0": [7 if rank == 0 else 0 for rank in range(world)],
        }[self.batches]


@dataclass
class Step:
    """One step of a memory over the whole batch: what went in and what must come out."""

    x_BTD: Tensor
    target_BTD: Tensor
    output_BTD: Tensor
    gradients: dict[str, Tensor]  # of "x", "weights" [M, L] and every dense parameter
    values_nD: Tensor
    state: dict[str, Tensor]  # of the values' optimizer


@dataclass
class Expected:
    start_nD: Tensor
    steps: list[Step] = field(default_factory=list)
    health: MemoryHealth | None = None


def plain(case: Case, rows: int, steps: int, optimizer: ValueOptimizer = OPTIMIZER) -> Expected:
    """`steps` steps of the memory in plain PyTorch on the CPU, over `rows` rows."""
    torch.manual_seed(0)
    memory = Memory(case.config(), TOKENS, WIDTH, seed=7)
    weight, usage = memory.values.weight, memory.values.usage
    naive = NaiveOptimizer(optimizer, weight.detach())
    expected = Expected(weight.detach().clone())
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        x_BTD = torch.randn(rows, TOKENS, WIDTH, generator=generator)
        target_BTD = torch.randn(rows, TOKENS, WIDTH, generator=generator)
        if case.repeated:
            x_BTD[:] = x_BTD[0, 0]
        x_BTD.requires_grad_()
        memory.zero_grad()
        before_n = usage.window_R.clone()
        with captured_weights(memory) as weights:
            output_BTD = memory(x_BTD)
        (output_BTD * target_BTD).sum().div(rows).backward()
        dense = {name: parameter for name, parameter in memory.named_parameters() if name != "values.weight"}
        gradients = {name: parameter.grad.clone() for name, parameter in dense.items()}
        gradients |= {"x": x_BTD.grad, "weights": weights[0].grad}
        with torch.no_grad():
            naive.step(weight, weight.grad, (usage.window_R - before_n).nonzero())
            for parameter in dense.values():
                parameter -= 0.1 * parameter.grad
        kept = x_BTD.detach(), target_BTD, output_BTD.detach(), gradients, weight.detach().clone()
        expected.steps.append(Step(*kept, {name: tensor.clone() for name, tensor in naive.state.items()}))
    expected.health = memory.values.health()
    return expected


def sharded(
    case: Case,
    device: torch.device,
    ranks_per_node: int,
    optimizer: ValueOptimizer = OPTIMIZER,
    **sharding: object,
) -> DistributedModelParallel:
    """The same memory over all ranks."""
    world = dist.get_world_size()
    torch.manual_seed(0)
    memory = Memory(case.config(**sharding), TOKENS, WIDTH, seed=7, device="meta")
    sharders = [MemoryValuesSharder(optimizer, ranks_per_node)]
    plan = make_plan(memory, sharders, world, 1 if device.type == "cuda" else world, device.type).sharding
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    return DistributedModelParallel(memory, env=env, device=device, plan=plan, sharders=sharders)


@dataclass(frozen=True)
class Tolerance:
    """Absolute and relative errors that are allowed; `state` is for updated values and optimizer state."""

    rtol: float = 2e-4
    atol: float = 2e-5
    state: float = 1.0  # times the two

    def close(self, found: Tensor, expected: Tensor, what: str, factor: float = 1.0) -> None:
        torch.testing.assert_close(
            found.detach().cpu(),
            expected,
            rtol=self.rtol * factor,
            atol=self.atol * factor,
            msg=lambda text: f"{what}: {text}",
        )


def check_parity(
    case: Case, expected: Expected, model: DistributedModelParallel, device: torch.device, tolerance: Tolerance
) -> None:
    """Output, every gradient, updated rows and state of each step, then the health of the whole."""
    rank, world = dist.get_rank(), dist.get_world_size()
    table: ShardedMemoryValues = model.module.values
    assert torch.equal(gathered(table, "weight"), expected.start_nD), "the start differs"
    dense = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert "values.weight" not in dense
    rows = case.rows_per_rank(world)
    mine = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    bags = slice(mine.start * TOKENS, mine.stop * TOKENS)
    for number, step in enumerate(expected.steps, 1):
        x_BTD = step.x_BTD[mine].to(device, copy=True).requires_grad_()
        model.zero_grad()
        with captured_weights(model.module) as weights:
            output_BTD = model(x_BTD)
        # the mean over the global batch, whatever each rank's share: DDP averages over ranks
        (output_BTD * step.target_BTD[mine].to(device)).sum().mul(world / sum(rows)).backward()
        tolerance.close(output_BTD, step.output_BTD[mine], f"output of step {number}")
        weights_gradient = torch.cat([part.grad for part in weights]) / world
        tolerance.close(weights_gradient, step.gradients["weights"][bags], "gradient of the weights")
        tolerance.close(x_BTD.grad / world, step.gradients["x"][mine], "gradient of x")
        for name, parameter in dense.items():
            tolerance.close(parameter.grad, step.gradients[name], f"gradient of {name}")
        tolerance.close(gathered(table, "weight"), step.values_nD, f"values after step {number}", tolerance.state)
        assert state_of(table).keys() == step.state.keys()
        for name, tensor in step.state.items():
            tolerance.close(gathered(table, name), tensor, f"{name} after step {number}", tolerance.state)
        with torch.no_grad():
            for parameter in dense.values():
                parameter -= 0.1 * parameter.grad
    check_health(table, expected.health)


def check_health(table: ShardedMemoryValues, expected: MemoryHealth) -> None:
    health = table.health()
    assert health.used_share == expected.used_share
    if isinstance(table, RowGatherUnique):
        assert 0 < health.hits <= expected.hits
    else:
        assert (health.hits, health.histogram) == (expected.hits, expected.histogram)
    everywhere = dist.get_world_size() if isinstance(table, Column) else 1
    assert sum(health.hits_per_owner) == health.hits * everywhere


@contextmanager
def captured_weights(memory: Memory) -> Iterator[list[Tensor]]:
    """The weights_ML of every retrieval, keeping their gradient."""
    weights: list[Tensor] = []
    retrieve = memory.retrieve

    def keep(x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        slots_ML, weights_ML = retrieve(x_BTD)
        weights_ML.retain_grad()
        weights.append(weights_ML)
        return slots_ML, weights_ML

    memory.retrieve = keep
    yield weights
    del memory.retrieve


def gathered(table: ShardedMemoryValues, what: str) -> Tensor:
    """The whole table, or a part of its optimizer state, from the parts that the ranks say they hold."""
    whole = table.state_dict()["weight"] if what == "weight" else state_of(table)[what]
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (whole.to_local() if isinstance(whole, DTensor) else whole).detach().cpu())
    sharded_by = [place.dim for place in whole.placements if place.is_shard()] if isinstance(whole, DTensor) else []
    found = torch.cat(parts, dim=sharded_by[0]) if sharded_by else parts[0]
    assert sharded_by or all(torch.equal(part, found) for part in parts), "replicas differ"
    assert found.shape == whole.shape
    return found


def state_of(table: ShardedMemoryValues) -> dict[str, Tensor]:
    """By the names of a checkpoint; {} where the optimizer has none."""
    return next(iter(table.fused_optimizer.state.values()), {})
