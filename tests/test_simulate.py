"""Simulated steps: exact against what gloo ranks count, expected against the mean of exact ones.

Shape suffixes: P chunks, W ranks, WW from a rank (first) to a rank (second), M bags of a rank, L hits a bag, C draws of
a bag.
"""

from __future__ import annotations

import gc
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.exchange_slots import first_distinct
from drawn_bags import drawn_bags
from msn_dist.memory.placement import Placement
from msn_dist.memory.values import MemoryValues, ValueSharding
from msn_dist.planner.layout import Layout, group_sizes
from msn_dist.planner.load import Load, Message
from msn_dist.planner.simulate import simulate, simulate_hits
from msn_dist.planner.traffic import Demand
from msn_dist.sharding import ValueOptimizer
from msn_dist.sharding.strategies import STRATEGIES, shard_values
from ranks import run_ranks

SLOTS, DIM, HITS = 1003, 24, 6  # of 1,003 rows the last rank of 2, 4 or 8 has fewer
EVEN = 64  # bags of each of 8 ranks
BAGS = {2: (5, 9), 4: (3, 0, 7, 4), 8: (4, 1, 0, 9, 2, 6, 3, 8)}
GROUPS = {4: (2,), 8: (2, 4)}  # ranks of groups that are no nodes, by world size
DEALS = {**{(world, bags): world for world, bags in BAGS.items()}, (8, (EVEN,) * 8): 4}  # ranks a node


def slots_of(bags: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(len(bags))
    draws_MC = torch.randint(SLOTS, (sum(bags), 4 * HITS), generator=generator)
    return first_distinct(draws_MC, HITS).split(bags)


def strategies_of(world: int) -> list[tuple[str, int | None]]:
    """(strategy, ranks of two_level's groups; None: a node)."""
    return [*((strategy, None) for strategy in STRATEGIES), *(("two_level", size) for size in GROUPS.get(world, ()))]


def counted(rank: int, world: int) -> dict[tuple, tuple]:
    """By (deal of bags, strategy, ranks a group): messages, bytes to each peer, and the owners' load of one step here.

    Whatever the size of its groups, two_level has the sums of row_pooled.
    """
    found = {}
    groups = {size: dist.new_group(list(range(size))) for size in BAGS}  # calls of all ranks
    for (size, bags), node in DEALS.items():
        if rank >= size:
            continue
        slots_ML, pooled = slots_of(bags)[rank], {}
        weights_ML = torch.rand(slots_ML.shape, generator=torch.Generator().manual_seed(rank), requires_grad=True)
        for strategy, group_ranks in strategies_of(size):
            sharding = ValueSharding(strategy, group_ranks=group_ranks)
            table = MemoryValues(SLOTS, DIM, init_std=1.0, seed=0, sharding=sharding, device="meta")
            values = shard_values(table, groups[size], ValueOptimizer(), torch.device("cpu"), node)
            pooled[strategy] = values(slots_ML, weights_ML)
            pooled[strategy].sum().backward()
            if strategy == "two_level":
                torch.testing.assert_close(pooled[strategy], pooled["row_pooled"])
            traffic, load = values.exchange.traffic, values.health().owner_load_max_over_mean
            found[bags, strategy, group_ranks] = traffic.by_message(), traffic.by_peer(), load
            del values, table
        del pooled
    gc.collect()
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[tuple, tuple]]:
    return run_ranks(counted, 8)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_exact_steps_are_those_of_real_ranks(strategy: str, found) -> None:
    for (world, bags), node in DEALS.items():
        demand = Demand.of(slots_of(bags), Placement.permuted(SLOTS))
        for group_ranks in (size for name, size in strategies_of(world) if name == strategy):
            step = simulate_hits(Layout(world, node, strategy, group_ranks=group_ranks), demand, DIM)
            for rank in range(world):
                messages, to_peers, load = found[rank][bags, strategy, group_ranks]
                assert messages == {way: sent for way, sent in step.sent_W[rank].items() if sent}, (bags, rank)
                assert sum(to_peers) == step.bytes_W[rank]
                assert load == pytest.approx(step.owner_load)


# (strategy, ranks a node, ranks a group): groups as large as a node, smaller and larger
PLACES = [(strategy, 4, None) for strategy in STRATEGIES]
PLACES += [("two_level", node, size) for node, size in ((4, 2), (8, 2), (8, 4), (2, 4), (1, 2), (1, 4))]


@pytest.mark.parametrize(("strategy", "node", "group_ranks"), PLACES)
def test_expected_messages_come_in_order_and_go_to_the_nodes_of_real_ranks(
    strategy: str, node: int, group_ranks: int | None, found
) -> None:
    even = (EVEN,) * 8
    layout = Layout(8, node, strategy, group_ranks=group_ranks)
    step = simulate(layout, Load.uniform(SLOTS, EVEN, HITS), DIM)
    names = list(dict.fromkeys((message.direction, message.name) for message in step.messages))
    messages, *_ = found[0][even, strategy, group_ranks]
    assert names == [(way, name) for way in ("forward", "backward") for name in messages.get(way, {})]
    to_peers_WW = torch.tensor([of_rank[even, strategy, group_ranks][1] for of_rank in found])
    node_W = torch.arange(8) // node
    between = int(to_peers_WW[node_W[:, None] != node_W].sum())
    assert step.bytes_between == pytest.approx(between / 8, rel=0.03)
    assert step.bytes_sent == pytest.approx(int(to_peers_WW.sum()) / 8, rel=0.03)


def test_groups_split_what_leaves_a_node_by_the_formulas() -> None:
    """64 ranks in nodes of 8: of the docstring of two_level."""
    sums = EVEN * DIM * 4
    for size in (2, 4, 8, 16, 32):
        step = simulate(Layout(64, 8, "two_level", group_ranks=size), Load.uniform(4096, EVEN, HITS), DIM)
        groups = 64 // size
        home = {m.name: m for m in step.messages if m.direction == "forward" and m.name.startswith("pooled")}
        between = home["pooled_in_group"].bytes_between, home["pooled"].bytes_between
        inside = home["pooled_in_group"].bytes_inside, home["pooled"].bytes_inside
        if size <= 8:
            assert between == pytest.approx((0, (64 - 8) // size * sums))
            assert inside == pytest.approx(((size - 1) * groups * sums, (8 // size - 1) * sums))
        else:
            assert between == pytest.approx(((size - 8) * groups * sums, (groups - 1) * sums))
            assert inside == pytest.approx((7 * groups * sums, 0))


@pytest.mark.parametrize("exponent", [0.0, 1.05, 1.2])
@pytest.mark.parametrize(("world", "chunks"), [(8, 1), (64, 1), (8, 3)])
def test_expected_bytes_are_the_mean_of_exact_ones(world: int, chunks: int, exponent: float) -> None:
    sub_keys, bags, hits, dim, repeats = 512, 64, 32, 64, 6
    slots = sub_keys**2
    demands = []
    for seed in range(repeats):
        slots_WP = [
            slots_ML.tensor_split(chunks)
            for slots_ML in drawn_bags(sub_keys, world * bags, hits, exponent, seed).split(bags)
        ]
        demands.append(Demand.of_chunks(list(zip(*slots_WP, strict=True)), Placement.permuted(slots)))
    load = Load.zipf(slots, bags, hits, exponent) if exponent else Load.uniform(slots, bags, hits)
    load = load.in_chunks(tuple(map(len, slots_WP[0])))
    settings = [("fp32", "rowwise_adagrad"), ("int8", "sgd"), ("int8", "rowwise_adam")]
    layouts = [Layout(world, 8, name, wire, optimizer=kind) for name, (wire, kind) in product(STRATEGIES, settings)]
    layouts += [Layout(world, 8, "two_level", group_ranks=size) for size in group_sizes(world, 8)]
    for layout in layouts:
        mean = {}
        for sent in (sent for demand in demands for sent in simulate_hits(layout, demand, dim).sent_W):
            for way, messages in sent.items():
                for name, size in messages.items():
                    mean[way, name] = mean.get((way, name), 0) + size / world / repeats
        assert expected(simulate(layout, load, dim).messages) == pytest.approx(mean, rel=0.01), layout


def expected(messages: list[Message]) -> dict[tuple[str, str], float]:
    by_name = {}
    for message in messages:
        key = message.direction, message.name
        by_name[key] = by_name.get(key, 0) + message.bytes_inside + message.bytes_between
    return by_name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_rank_sends_nothing(strategy: str) -> None:
    step = simulate(Layout(1, 1, strategy), Load.uniform(SLOTS, EVEN, HITS), DIM)
    assert (step.messages, step.bytes_sent, step.owner_load) == ([], 0, 1)


def test_large_worlds_are_simulated_with_every_strategy_that_can_serve_them() -> None:
    for world, power in product((8, 64, 512, 4096), (20, 28, 36)):
        load = Load.zipf(2**power, 16_384, 32, 1.05)
        sent = {}
        for strategy in STRATEGIES:
            if strategy != "column" or world <= 64:
                step = simulate(Layout(world, 8, strategy), load, 64)
                sent[strategy] = step.bytes_sent
                assert step.bytes_between <= step.bytes_sent and (step.bytes_between > 0) == (world > 8)
        # sums grow with W, rows do not; two levels send as many bytes as one, and one row is sent once at most
        assert sent["two_level"] == pytest.approx(sent["row_pooled"])
        assert sent["row_gather_unique"] < sent["row_gather"]
        assert (sent["row_gather"] < sent["row_pooled"]) == (world > 32)
