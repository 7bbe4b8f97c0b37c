"""The sharded memory equals the plain one: every strategy, world size and wire (one recipe, many cases)."""

from __future__ import annotations

import gc
import os
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel

from memory_parity import (
    TOKENS,
    WIDTH,
    Case,
    Tolerance,
    captured_weights,
    check_parity,
    gathered,
    plain,
    sharded,
)
from msn_dist.errors import InputError
from msn_dist.memory.values import VALUE_DTYPES
from msn_dist.sharding.row_sharded import shard_of
from msn_dist.sharding.strategies import STRATEGIES
from naive_optimizer import NaiveOptimizer, optimizer_of
from ranks import run_ranks

CASES = [
    Case("uneven batches", "uneven"),
    Case("an empty local batch", "one empty"),
    Case("only one rank has rows", "all on rank 0"),
    Case("the same hot slots in every row, owners without a hit", "uneven", sub_keys=20, heads=1, repeated=True),
    Case("more slots than hits", "even", sub_keys=64, heads=1, value_dim=8),
    Case("slots per token", "uneven", share="token"),
    Case("mixing Theta, concat gate", "even", theta="mix", gate="concat"),
]
# Allowed errors of a lossy wire in one step, from the bounds in msn_dist/sharding/wire.py times the size of what
# is compared (about 1), and some for what the gradients are multiplied with on the way to the dense parameters.
LOSSY = {
    "bf16": Tolerance(rtol=0.03, atol=0.008, state=2),
    "fp16": Tolerance(rtol=0.005, atol=0.001, state=2),
    "int8": Tolerance(rtol=0.06, atol=0.02, state=2),
}


STEP_OVER_RANKS = ("column", "replicated")  # which FBGEMM cannot do
# The retrieval does not know of the strategy, so once is enough.
INTERPRETED = {name: {"lookup": "triton"} for name in STRATEGIES}
INTERPRETED["row_pooled"] = {"lookup": "triton", "retrieval": "triton"}
SGD, ADAM = optimizer_of("sgd"), optimizer_of("rowwise_adam")


def parity_of_all(rank: int, world: int, device: str, strategies: list[str]) -> list[str]:
    """All cases exactly; the first and the hot one with the lossy wires, in chunks, and by the other back ends; one of
    these two by the other optimizers.  Groups of a size that is set are in nodes of one rank.

    Kernels are the default on a GPU, and get everything; the interpreter is slow, and gets one step of the first case.
    Returns what was compared.
    """
    compared = []
    device = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    for case in CASES:
        rows = sum(case.rows_per_rank(world))
        expected, one_step = plain(case, rows, steps=3), plain(case, rows, steps=1)
        settings = [({}, expected, Tolerance())]
        if case in (CASES[0], CASES[3]):
            settings += [({"wire": wire}, one_step, tolerance) for wire, tolerance in LOSSY.items() if world > 1]
            other = {"lookup": "reference", "retrieval": "reference"}
            settings += [({"chunks": 3}, expected, Tolerance()), (other, expected, Tolerance())]
            if device.type == "cuda":
                settings.append(({"lookup": "fbgemm"}, expected, Tolerance()))
        every = []
        if case in (CASES[0], CASES[2]) and world == 4:
            for sharding in ({"group_ranks": 2}, {"group_ranks": 2, "chunks": 3}):
                every.append(("two_level", (sharding, expected, Tolerance())))
        if case is CASES[3 if world == 4 else 0]:
            for sharding in ({"optimizer": SGD}, {"optimizer": ADAM, "chunks": 3}):
                settings.append((sharding, plain(case, rows, 3, sharding["optimizer"]), Tolerance()))
        every += product(strategies, settings)
        if device.type == "cpu" and case is CASES[0]:
            every += [(strategy, (kernels, one_step, Tolerance())) for strategy, kernels in INTERPRETED.items()]
            kernels, truth = {"lookup": "triton", "optimizer": ADAM}, plain(case, rows, 1, ADAM)
            every += product(("row_pooled", *STEP_OVER_RANKS), [(kernels, truth, Tolerance())])
        if device.type == "cpu" and world == 2 and case in (CASES[2], CASES[3]):  # ranks without bags, and hot rows
            for sharding, tolerance in (({}, Tolerance()), ({"wire": "fp16"}, LOSSY["fp16"])):
                kernels = {"lookup": "triton"} | sharding
                every += product(
                    ("row_gather", "row_gather_unique", *STEP_OVER_RANKS), [(kernels, one_step, tolerance)]
                )
        for strategy, (sharding, truth, tolerance) in every:
            if strategy in STEP_OVER_RANKS and sharding.get("lookup") == "fbgemm":
                continue
            node = 2 if world == 4 and "group_ranks" not in sharding else 1
            model = sharded(case, device, node, strategy=strategy, **sharding)
            assert_back_ends(model, strategy, sharding, device)
            try:
                check_parity(case, truth, model, device, tolerance)
            except AssertionError as error:
                raise AssertionError(f"{strategy} {sharding}, case {case.name!r}: {error}") from error
            how = ", ".join(f"{key} {value}" for key, value in sharding.items()) or "wire fp32"
            compared.append(f"W = {world}  {strategy:18}  {how:18}  {case.name}, {len(truth.steps)} steps")
            del model
        gc.collect()
    for strategy in strategies:
        check_autocast(device, strategy)
        if world == 2:
            check_hits_of_weight_zero(device, strategy)
        settings = [{"value_dtype": "bf16", "chunks": 3}, {"value_dtype": "fp16"}]
        if device.type == "cuda" and strategy not in STEP_OVER_RANKS:
            settings.append({"value_dtype": "fp16", "lookup": "fbgemm"})
        elif device.type == "cpu" and strategy in ("row_pooled", *STEP_OVER_RANKS):
            settings.append({"value_dtype": "bf16", "chunks": 3, "lookup": "triton"})
        for sharding in settings:
            check_16_bits(CASES[0], device, strategy=strategy, **sharding)
            how = ", ".join(f"{key} {value}" for key, value in sharding.items())
            compared.append(f"W = {world}  {strategy:18}  {how:18}  {CASES[0].name}, 1 step")
    return compared


def check_hits_of_weight_zero(device: torch.device, strategy: str) -> None:
    """They are hits: by row-wise Adam their rows move on, and no others."""
    rank, case = dist.get_rank(), CASES[0]
    table = sharded(case, device, 1, ADAM, strategy=strategy).module.values
    values_nD = gathered(table, "weight")
    naive = NaiveOptimizer(ADAM, values_nD)
    for weight in (1.0, 0.0):
        slots_ML = torch.arange(12).view(3, 4) + 10 * rank
        weights_ML = torch.full((3, 4), weight, device=device, requires_grad=True)
        (table(slots_ML.to(device), weights_ML).sum() * dist.get_world_size()).backward()
        row_H = table.placement.row_of(torch.cat([slots_ML + 10 * (r - rank) for r in range(dist.get_world_size())]))
        row_H = row_H.flatten()
        gradient_nD = torch.zeros_like(values_nD).index_add_(0, row_H, torch.full((len(row_H), table.dim), weight))
        naive.step(values_nD, gradient_nD, row_H)
    Tolerance().close(gathered(table, "weight"), values_nD, f"{strategy}: values after hits of weight zero")
    Tolerance().close(gathered(table, "first_moment"), naive.state["first_moment"], f"{strategy}: first moments")


def check_autocast(device: torch.device, strategy: str) -> None:
    """Sums are rounded to bf16 at the end, and a gradient of bf16 does what the same numbers do in float32."""
    rank, case = dist.get_rank(), CASES[0]
    generator = torch.Generator().manual_seed(rank)
    slots_ML = torch.randint(20, (3, 4), generator=generator).to(device)
    weights_ML = torch.randn(3, 4, generator=generator).to(device)
    gradient_MD = torch.randn(3, case.value_dim or WIDTH, generator=generator).to(device, torch.bfloat16)
    found = []
    for enabled in (False, True):
        table = sharded(case, device, 1, strategy=strategy).module.values
        leaf_ML = weights_ML.clone().requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            chunks = [(slots_ML[:1], leaf_ML[:1]), (slots_ML[1:], leaf_ML[1:])]
            whole_MD, parts = table(slots_ML, leaf_ML), table.pooled_in_chunks(chunks)
        assert {part.dtype for part in (whole_MD, *parts)} == {torch.bfloat16 if enabled else torch.float32}
        torch.cat(parts).backward(gradient_MD.to(whole_MD.dtype))
        whole_MD.backward(gradient_MD.to(whole_MD.dtype))
        found.append([whole_MD, torch.cat(parts), leaf_ML.grad, gathered(table, "weight"), gathered(table, "moment")])
    for place, (one, other) in enumerate(zip(*found, strict=True)):
        sums = place < 2
        torch.testing.assert_close(
            other, one.to(torch.bfloat16) if sums else one, msg=lambda text: f"{strategy}: {text}",
            **({"rtol": 2**-7, "atol": 1e-3} if sums else {}),
        )  # fmt: skip


def check_16_bits(case: Case, device: torch.device, *, strategy: str, value_dtype: str, **other: object) -> None:
    """One step is that of float32 values which start as the same numbers; what is stored is then a neighbour of them.

    float32 values go by the look-up that is compared with the plain memory above.
    """
    rank, world, dtype = dist.get_rank(), dist.get_world_size(), VALUE_DTYPES[value_dtype]
    node = 2 if world == 4 else 1
    half = sharded(case, device, node, strategy=strategy, value_dtype=value_dtype, **other)
    full = sharded(case, device, node, strategy=strategy, **other)
    what = f"{strategy} {value_dtype} {other}"
    start_nD = gathered(full.module.values, "weight").to(dtype)
    assert half.module.values.weight.dtype == dtype
    assert torch.equal(gathered(half.module.values, "weight"), start_nD), f"{what}: the start differs"
    full.module.values.load_state_dict(half.module.values.state_dict())

    rows = case.rows_per_rank(world)[rank]
    x_BTD = torch.randn(rows, TOKENS, WIDTH, generator=torch.Generator().manual_seed(rank))
    found = []
    for model in (half, full):
        x = x_BTD.to(device, copy=True).requires_grad_()
        with captured_weights(model.module) as weights:
            output_BTD = model(x)
        output_BTD.square().sum().backward()
        found.append([output_BTD, x.grad, *(part.grad for part in weights), gathered(model.module.values, "moment")])
    for one, truth in zip(*found, strict=True):
        assert one.dtype == torch.float32
        Tolerance().close(one, truth.detach().cpu(), what)
    found_nD, truth_nD = (gathered(model.module.values, "weight") for model in (half, full))
    Tolerance(rtol=torch.finfo(dtype).eps).close(found_nD.float(), truth_nD, f"{what}: values after the step")
    assert not torch.equal(found_nD, start_nD) and not torch.equal(found_nD, truth_nD.to(dtype)), what


def assert_back_ends(model: DistributedModelParallel, strategy: str, asked: dict, device: torch.device) -> None:
    """Those that were asked for; else the kernels on a GPU.  On one rank every strategy is the same."""
    on_gpu = device.type == "cuda"
    over_ranks = strategy in STEP_OVER_RANKS and model.module.values.exchange.world > 1
    lookup = "triton" if on_gpu else "reference" if over_ranks else "fbgemm"
    if lookup == "fbgemm" and asked.get("optimizer") == ADAM:
        lookup = "reference"
    expected = {"lookup": lookup, "retrieval": "triton" if on_gpu else "reference"} | asked
    found = {"lookup": model.module.values.lookup.name, "retrieval": model.module.keys.back_end(device)}
    assert all(found[part] == expected[part] for part in found), (found, expected)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_strategy_equals_the_plain_memory(world: int) -> None:
    run_ranks(parity_of_all, world, "cpu", list(STRATEGIES))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_strategy_equals_the_plain_memory_on_a_gpu(world: int, backend: str) -> None:
    """With fewer GPUs than ranks NCCL must be 2.30 or newer, and NCCL_MULTI_RANK_GPU_ENABLE=1."""
    if backend == "nccl" and torch.cuda.device_count() < world and not os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE"):
        pytest.skip(f"{world} ranks over NCCL need as many GPUs, or NCCL 2.30 and NCCL_MULTI_RANK_GPU_ENABLE=1")
    compared, *_ = run_ranks(parity_of_all, world, "cuda", list(STRATEGIES), backend=backend)
    print(f"{backend} on {torch.cuda.get_device_name()}", *compared, sep="\n")


@pytest.mark.parametrize("world", [4, 6, 100])
def test_a_rank_without_rows_is_refused(world: int) -> None:
    with pytest.raises(InputError, match=r"a memory of 9 slots leaves rank \d+ of \d+ without rows: use fewer ranks"):
        shard_of(9, world, 0)


@pytest.mark.parametrize(("slots", "world"), [(9, 1), (9, 3), (49, 4), (2**20, 8), (2**36, 512), (101, 2)])
def test_blocks_cover_every_row_once(slots: int, world: int) -> None:
    shards = [shard_of(slots, world, rank) for rank in range(world)]
    assert shards[0][1] == 0 and sum(rows for _, _, rows in shards) == slots
    assert all(first == rank * block and rows > 0 for rank, (block, first, rows) in enumerate(shards))
