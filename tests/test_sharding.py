"""The sharded memory equals the plain one, at any world size (one recipe, many cases)."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv

from msn_dist.config import MemoryConfig
from msn_dist.errors import InputError
from msn_dist.kernels import reference
from msn_dist.memory import Memory
from msn_dist.planner import make_plan
from msn_dist.sharding import MemoryValuesSharder, ValueOptimizer
from msn_dist.sharding.sharded_values import shard_of
from ranks import run_ranks

WIDTH, TOKENS = 16, 3
OPTIMIZER = ValueOptimizer(learning_rate=0.3, eps=1e-8)


@dataclass(frozen=True)
class Case:
    """B rows in all, dealt to the ranks by `batches`."""

    name: str
    batches: str  # "even", "uneven", "one empty", "all on rank 0"
    sub_keys: int = 9  # 81 slots: neither 2 nor 4 ranks divide them
    heads: int = 2
    repeated: bool = False  # every row is the same: the same slots are hit again and again
    lookup: str = "fbgemm"
    gate: str = "tanh"
    share: str = "all"
    theta: str = "key"

    def config(self) -> MemoryConfig:
        return MemoryConfig(
            sub_keys=self.sub_keys, top_k=4, heads=self.heads, key_dim=8, value_dim=12, lookup=self.lookup,
            gate=self.gate, share=self.share, theta=self.theta,
        )  # fmt: skip

    def rows_per_rank(self, world: int) -> list[int]:
        return {
            "even": [4] * world,
            "uneven": [3 + 2 * rank for rank in range(world)],
            "one empty": [0 if rank == world - 1 and world > 1 else 5 for rank in range(world)],
            "all on rank 0": [7 if rank == 0 else 0 for rank in range(world)],
        }[self.batches]


CASES = [
    Case("even batches", "even"),
    Case("uneven batches", "uneven"),
    Case("reference lookup, uneven batches", "uneven", lookup="reference"),
    Case("an empty local batch", "one empty"),
    Case("only one rank has rows", "all on rank 0"),
    Case("the same hot slots in every row, owners without a hit", "uneven", sub_keys=20, heads=1, repeated=True),
    Case("more slots than hits", "even", sub_keys=64, heads=1),
    Case("slots per token", "uneven", share="token"),
    Case("mixing Theta, concat gate", "even", theta="mix", gate="concat"),
]


def whole_and_sharded(case: Case, world: int, device: torch.device) -> tuple[Memory, DistributedModelParallel]:
    torch.manual_seed(0)
    whole = Memory(case.config(), TOKENS, WIDTH, seed=7)
    torch.manual_seed(0)
    to_shard = Memory(case.config(), TOKENS, WIDTH, seed=7, device="meta")
    sharders = [MemoryValuesSharder(OPTIMIZER)]
    sharded = DistributedModelParallel(
        to_shard,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=device,
        plan=make_plan(to_shard, sharders, world, 1 if device.type == "cuda" else world, device.type).sharding,
        sharders=sharders,
    )
    return whole, sharded


@contextmanager
def captured_weights(memory: Memory) -> Iterator[list[Tensor]]:
    """The weights_ML that the table was called with, keeping their gradient."""
    weights: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
        inputs[1].retain_grad()
        weights.append(inputs[1])

    hook = memory.values.register_forward_pre_hook(keep)
    yield weights
    hook.remove()


def gathered(local: Tensor) -> Tensor:
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, local.cpu())
    return torch.cat(parts)


def check_parity(case: Case, rank: int, world: int, device: torch.device) -> None:
    """The plain memory is on the CPU, always."""
    whole, sharded = whole_and_sharded(case, world, device)
    table = sharded.module.values
    moment_R = torch.zeros(len(whole.values.weight))
    assert torch.equal(gathered(table.weight.detach()), whole.values.weight.detach()), "the start differs"
    dense = {name: p for name, p in sharded.named_parameters() if p.requires_grad}
    assert "values.weight" not in dense
    rows = case.rows_per_rank(world)
    mine = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x_BTD = torch.randn(sum(rows), TOKENS, WIDTH, generator=generator)
        target_BTD = torch.randn(sum(rows), TOKENS, WIDTH, generator=generator)
        if case.repeated:
            x_BTD[:] = x_BTD[0, 0]
        x_all, x_mine = x_BTD.clone().requires_grad_(), x_BTD[mine].to(device, copy=True).requires_grad_()
        whole.zero_grad()
        sharded.zero_grad()
        with captured_weights(whole) as weights_all, captured_weights(sharded.module) as weights_mine:
            expected, found = whole(x_all), sharded(x_mine)
        close(found, expected[mine], "output")
        (expected * target_BTD).sum().div(sum(rows)).backward()
        # the mean over the global batch, whatever each rank's share: DDP averages over ranks
        (found * target_BTD[mine].to(device)).sum().mul(world / sum(rows)).backward()
        close(x_mine.grad / world, x_all.grad[mine], "gradient of x")
        bags = slice(mine.start * TOKENS, mine.stop * TOKENS)
        close(weights_mine[0].grad / world, weights_all[0].grad[bags], "gradient of the weights")
        for name, parameter in whole.named_parameters():
            if name != "values.weight":
                close(dense[name].grad, parameter.grad, f"gradient of {name}")
        with torch.no_grad():
            reference.rowwise_adagrad_(
                whole.values.weight, moment_R, whole.values.weight.grad,
                OPTIMIZER.learning_rate, OPTIMIZER.eps,
            )  # fmt: skip
            for name, parameter in whole.named_parameters():
                if name != "values.weight":
                    parameter -= 0.1 * parameter.grad
                    dense[name] -= 0.1 * dense[name].grad
        close(gathered(table.weight.detach()), whole.values.weight.detach(), f"values after step {step + 1}")
        close(gathered(table.lookup.moment_R), moment_R, f"Adagrad state after step {step + 1}")
    health, expected_health = table.health(), whole.values.health()
    assert health.hits == expected_health.hits == 3 * sum(rows) * TOKENS * case.heads * 4
    assert health.histogram == expected_health.histogram
    assert sum(health.hits_per_owner) == health.hits
    del sharded, table


def close(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-4, atol=2e-5, msg=lambda text: f"{what}: {text}")


def parity_of_all_cases(rank: int, world: int, device: str) -> None:
    for case in CASES:
        try:
            check_parity(case, rank, world, torch.device(device))
        except AssertionError as error:
            raise AssertionError(f"case {case.name!r}: {error}") from error
        gc.collect()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_sharded_memory_equals_the_plain_one(world: int) -> None:
    run_ranks(parity_of_all_cases, world, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_sharded_memory_equals_the_plain_one_on_a_gpu(world: int, backend: str) -> None:
    """Several NCCL ranks share a GPU if NCCL is 2.30 or newer and NCCL_MULTI_RANK_GPU_ENABLE=1."""
    run_ranks(parity_of_all_cases, world, "cuda", backend=backend)


@pytest.mark.parametrize("world", [4, 6, 100])
def test_a_rank_without_rows_is_refused(world: int) -> None:
    with pytest.raises(InputError, match=r"a memory of 9 slots leaves rank \d+ of \d+ without rows: use fewer ranks"):
        shard_of(9, world, 0)


@pytest.mark.parametrize(("slots", "world"), [(9, 1), (9, 3), (49, 4), (2**20, 8), (2**36, 512), (101, 2)])
def test_blocks_cover_every_row_once(slots: int, world: int) -> None:
    shards = [shard_of(slots, world, rank) for rank in range(world)]
    assert shards[0][1] == 0 and sum(rows for _, _, rows in shards) == slots
    assert all(first == rank * block and rows > 0 for rank, (block, first, rows) in enumerate(shards))
