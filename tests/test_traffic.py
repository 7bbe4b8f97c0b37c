"""The bytes that the exchange counts are those of the formulas, for every strategy, wire, world size and chunks.

Shape suffixes: C chunks, W ranks, M bags of a rank, L hits a bag.
"""

from __future__ import annotations

import gc

import pytest
import torch
import torch.distributed as dist

from msn_dist.errors import InputError
from msn_dist.memory.placement import Placement
from msn_dist.memory.values import MemoryValues, ValueSharding
from msn_dist.planner.traffic import Demand, bytes_of_step
from msn_dist.sharding import ValueOptimizer
from msn_dist.sharding.strategies import STRATEGIES, shard_values
from msn_dist.sharding.traffic import Traffic
from msn_dist.sharding.wire import row_bytes, wires
from ranks import run_ranks

SLOTS, DIM, HITS = 143, 20, 6
WIRES = ["fp32", "bf16", "fp16", "int8"]
OPTIMIZERS = {"column": ["sgd", "rowwise_adam"], "replicated": ["sgd", "rowwise_adam"]}  # on which bytes depend
BAGS = {1: [[5]], 2: [[4, 7], [0, 3]], 3: [[2, 0, 9]], 4: [[3, 5, 0, 2], [0, 0, 8, 0]]}  # of the ranks, by world size

# on 4 ranks: strategy, ranks a node, width, ranks a group as they are set
REFUSED = [("two_level", 3, DIM, None), ("two_level", 2, DIM, 3), ("two_level", 2, DIM, 4), ("column", 1, 6, None)]


def slots_of(bags: list[int]) -> list[torch.Tensor]:
    """Few slots, so that some rows are hit again."""
    generator = torch.Generator().manual_seed(sum(bags))
    return [torch.randint(SLOTS, (count, HITS), generator=generator) ** 2 % SLOTS for count in bags]


def sharded(
    strategy: str,
    group: dist.ProcessGroup,
    wire: str = "fp32",
    node: int = 1,
    optimizer: str = "rowwise_adagrad",
    dim: int = DIM,
    group_ranks: int | None = None,
):
    layout = ValueSharding(strategy, wire, group_ranks=group_ranks)
    table = MemoryValues(SLOTS, dim, init_std=1.0, seed=0, sharding=layout, device="meta")
    return shard_values(table, group, ValueOptimizer(kind=optimizer), torch.device("cpu"), node)


def settings_of(strategy: str, size: int) -> list[tuple]:
    """(chunks, wire, ranks a group, optimizer), those that are tested."""
    groups = (1, 2, 4) if strategy == "two_level" and size == 4 else (1,)
    by_wire = [(1, wire, group_ranks, "rowwise_adagrad") for wire in WIRES for group_ranks in groups]
    by_wire += [(1, "int8", 1, optimizer) for optimizer in OPTIMIZERS.get(strategy, [])]
    return by_wire + [(chunks, "fp32", 1, "rowwise_adagrad") for chunks in (2, 4)]


def counted(rank: int, world: int) -> dict[tuple, tuple[dict, list[int]]]:
    """By (deal of bags, strategy, *setting): what this rank's exchange has counted in one step.

    Groups of 1 and 4 are nodes; those of 2 are set, in nodes of 1 and of 4.
    """
    found = {}
    for strategy, node, dim, group_ranks in REFUSED:
        with pytest.raises(InputError) as refusal:
            sharded(strategy, dist.group.WORLD, node=node, dim=dim, group_ranks=group_ranks)
        found["refused", strategy, group_ranks] = str(refusal.value)
    for size, deals in BAGS.items():
        group = dist.new_group(list(range(size)))  # a call of all ranks, for a group of some
        if rank >= size:
            continue
        for bags in deals:
            slots_ML = slots_of(bags)[rank]
            for strategy in STRATEGIES:
                for setting in settings_of(strategy, size):
                    chunks, wire, group_ranks, optimizer = setting
                    asked, node = (2, 1 if wire == "fp32" else 4) if group_ranks == 2 else (None, group_ranks)
                    values = sharded(strategy, group, wire, node, optimizer, group_ranks=asked)
                    weights_ML = torch.rand(slots_ML.shape, requires_grad=True)
                    if chunks == 1:
                        pooled = [values(slots_ML, weights_ML)]
                    else:
                        parts = slots_ML.tensor_split(chunks), weights_ML.tensor_split(chunks)
                        pooled = values.pooled_in_chunks(zip(*parts, strict=True))
                    torch.cat(pooled).sum().backward()
                    traffic = values.exchange.traffic
                    found[tuple(bags), strategy, *setting] = traffic.by_message(), traffic.by_peer()
                    del values, pooled
        gc.collect()
    return found


@pytest.fixture(scope="module")
def found() -> list[dict]:
    return run_ranks(counted, 4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_message_has_the_bytes_of_its_formula(strategy: str, found) -> None:
    checked = 0
    for bags in (tuple(bags) for deals in BAGS.values() for bags in deals):
        for key in (key for key in found[0] if key[:2] == (bags, strategy)):
            chunks, *setting = key[2:]
            slots_CW = zip(*(slots_ML.tensor_split(chunks) for slots_ML in slots_of(list(bags))), strict=True)
            demand = Demand.of_chunks(list(slots_CW), Placement.permuted(SLOTS))
            expected = bytes_of_step(strategy, demand, DIM, *setting)
            for rank, bytes_of_rank in enumerate(expected):
                messages, by_peer = found[rank][key]
                assert messages == {way: sent for way, sent in bytes_of_rank.items() if sent}, (key, rank)
                assert sum(by_peer) == sum(sum(sent.values()) for sent in bytes_of_rank.values())
                assert by_peer[rank] == 0
            checked += 1
    assert checked >= 4 * len(WIRES)


def test_what_no_deal_of_rows_or_columns_can_serve_is_refused_on_every_rank(found) -> None:
    for of_rank in found:
        assert of_rank["refused", "two_level", None] == (
            "memory.strategy=two_level: 4 ranks are not a multiple of the 3 of this node; start as many on every node, "
            "set memory.group_ranks, or use row_pooled"
        )
        for size in (3, 4):
            assert of_rank["refused", "two_level", size] == (
                f"memory.group_ranks={size}: 4 ranks are not several groups of {size}; "
                "set it to 2, or leave it out for groups of a node"
            )
        assert "values of width 6 leave a rank of 4 without columns" in of_rank["refused", "column", None]


def test_what_a_rank_keeps_and_what_is_empty_is_not_counted() -> None:
    traffic = Traffic(3)
    assert traffic.by_message() == {} and traffic.by_peer() == [0, 0, 0]
    traffic.add("forward", "hits", [0, 8, 24])
    traffic.add("forward", "hits", [0, 8, 0])
    traffic.add("backward", "hits_gradient", [0, 0, 4])
    traffic.add("backward", "pooled_gradient", [0, 0, 0])
    assert traffic.by_message() == {"forward": {"hits": 40}, "backward": {"hits_gradient": 4}}
    assert traffic.by_peer() == [0, 16, 28] and traffic.total() == 44


@pytest.mark.parametrize("dim", [4, 7, 20])
@pytest.mark.parametrize("rows", [0, 1, 50])
@pytest.mark.parametrize("kind", WIRES)
def test_rows_take_the_bytes_and_have_the_errors_that_are_documented(kind: str, rows: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    rows_XD = torch.randn(rows, dim, generator=generator) * 10.0 ** torch.randint(
        -12, 5, (rows, 1), generator=generator
    )
    largest_X1 = rows_XD.abs().amax(1, keepdim=True) if rows else rows_XD[:, :1]
    error = {"fp32": 0, "bf16": 2**-8 * rows_XD.abs(), "fp16": 2**-11 * rows_XD.abs() + 2**-25 * largest_X1}
    for_values, for_gradients = wires(kind, torch.device("cpu"), seed=1)
    for wire, bound in ((for_values, largest_X1 / 254), (for_gradients, largest_X1 / 127)):
        message = wire.encode(rows_XD)
        assert len(message) == rows and message.numel() * message.element_size() == rows * row_bytes(kind, dim)
        found_XD = wire.decode(message)
        assert found_XD.shape == rows_XD.shape and found_XD.dtype == torch.float32
        assert ((found_XD - rows_XD).abs() <= error.get(kind, bound) * (1 + 1e-5)).all()
    assert torch.equal(for_values.decode(for_values.encode(rows_XD * 0)), rows_XD * 0)


def test_random_rounding_keeps_the_mean_that_rounding_to_the_nearest_loses() -> None:
    for_values, for_gradients = wires("int8", torch.device("cpu"), seed=3)
    rows_XD = torch.full((20_000, 2), 0.001)
    rows_XD[:, 1] = 1.0
    assert for_values.decode(for_values.encode(rows_XD))[:, 0].mean() == 0
    assert for_gradients.decode(for_gradients.encode(rows_XD))[:, 0].mean() == pytest.approx(0.001, rel=0.05)


@pytest.mark.parametrize("kind", ["bf16", "fp16", "int8"])
def test_a_row_that_is_not_finite_does_not_arrive_as_one_that_is(kind: str) -> None:
    wire, _ = wires(kind, torch.device("cpu"), seed=0)
    rows_XD = torch.ones(3, 4)
    rows_XD[1, 2], rows_XD[2, 0] = float("nan"), float("inf")
    found_XD = wire.decode(wire.encode(rows_XD))
    assert found_XD[0].isfinite().all()
    assert not found_XD[1].isfinite().all() and not found_XD[2].isfinite().all()
