"""Id tables placed through TorchRec's planner: what fits, what is fast, and that it trains as placed."""

from __future__ import annotations

import gc
import logging
import os

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torchrec.distributed.comm_ops import set_use_sync_collectives
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from msn_dist.errors import InputError
from msn_dist.memory import MemoryValues
from msn_dist.models.features import one_row
from msn_dist.planner.id_tables import IdTablesPlan, NoRoom, plan_id_tables
from msn_dist.planner.machine import Collective, Curve, Machine, load_machine
from msn_dist.planner.topology import Link, Topology
from msn_dist.sharding import MemoryValuesSharder
from ranks import run_ranks

GIB, DIM = 2**30, 16
RATE, EPS = 0.5, 1e-8
ADAGRAD = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": RATE, "eps": EPS}
SHARDERS = [EmbeddingBagCollectionSharder(fused_params=ADAGRAD), EmbeddingCollectionSharder(fused_params=ADAGRAD)]
H200 = load_machine("h200")
CRITEO = [39_884_406, 39_043, 17_289, 7_420, 20_263, 3, 7_120, 1_543, 63, 38_532_951, 2_953_546, 403_346, 10]
CRITEO += [2_208, 11_938, 155, 4, 976, 14, 39_979_771, 25_641_295, 39_664_984, 585_935, 12_972, 108, 36]


class Tables(nn.Module):
    """Tables read as bags, and as sequences; each by a feature of its own name."""

    def __init__(self, bags: dict[str, int], sequences: dict[str, int] | None = None, device: str = "meta") -> None:
        super().__init__()
        self.bags = EmbeddingBagCollection(
            [EmbeddingBagConfig(**config_of(name, rows), pooling=PoolingType.SUM) for name, rows in bags.items()],
            device=torch.device(device),
        )
        if sequences:
            self.sequences = EmbeddingCollection(
                [EmbeddingConfig(**config_of(name, rows)) for name, rows in sequences.items()],
                device=torch.device(device),
            )

    def forward(self, ids: KeyedJaggedTensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        lengths_KB = ids.lengths().view(len(ids.keys()), -1)
        sequences = self.sequences(one_row(ids, lengths_KB))
        return self.bags(ids).to_dict(), {name: rows.values() for name, rows in sequences.items()}


def config_of(name: str, rows: int) -> dict:
    return {"name": name, "num_embeddings": rows, "embedding_dim": DIM, "feature_names": [name]}


def linked(machine: Machine, gb_s: float, latency: float = 0.0) -> Machine:
    return machine.model_copy(
        update={"all_to_all": Collective(latency=latency, bandwidth=gb_s * 1e9, source="estimated")}
    )


MACHINE = linked(H200, 350.0)


def ranks(nodes: int, ranks_per_node: int, gib: float = 80.0, between_gb_s: float = 40.0) -> Topology:
    between = Link(bandwidth_gb_s=between_gb_s, latency_us=0.0)
    return Topology(
        name="test", machine="h200", nodes=nodes, ranks_per_node=ranks_per_node, device_gib=gib, between_nodes=between
    )


def planned(model: nn.Module, topology: Topology, reserved: int = 0, rows: int = 2048, **options) -> IdTablesPlan:
    return plan_id_tables(model, SHARDERS, topology, MACHINE, rows, reserved, **options)


def criteo() -> Tables:
    return Tables({f"c{i}": rows for i, rows in enumerate(CRITEO)})


def held_W(plan: IdTablesPlan) -> list[int]:
    return [table + exchange for table, exchange in zip(plan.table_bytes_W, plan.exchange_bytes_W, strict=True)]


def spread(numbers: list[float]) -> float:
    return max(numbers) * len(numbers) / sum(numbers)


def test_every_row_has_one_place_and_its_bytes_on_512_ranks() -> None:
    plan = planned(criteo(), ranks(64, 8), reserved=60 * GIB)
    placements = plan.placements["bags"]
    assert [sum(placements[f"c{i}"].rows_per_rank) for i in range(26)] == CRITEO
    assert sum(plan.table_bytes_W) == sum(CRITEO) * (4 * DIM + 4)
    assert max(held_W(plan)) <= 20 * GIB
    for placement in placements.values():
        holders = [rank for rank, rows in enumerate(placement.rows_per_rank) if rows]
        if placement.sharding == "table_wise":
            assert len(holders) == 1
        else:  # the large ones relieve the fullest rank without a loss
            assert placement.sharding == "table_row_wise" and holders == list(range(holders[0], holders[0] + 8))
            assert holders[0] % 8 == 0
    assert {placements[f"c{i}"].sharding for i in (0, 9, 19, 20, 21)} == {"table_row_wise"}


def test_what_torchrec_is_given_is_what_is_described() -> None:
    plan = planned(criteo(), ranks(4, 4, gib=1.2))
    for table, placement in plan.placements["bags"].items():
        given = plan.sharding.plan["bags"][table]
        assert (given.sharding_type, given.compute_kernel) == (placement.sharding, "fused")
        rows_W = [0] * 16
        for shard in given.sharding_spec.shards:
            rows_W[shard.placement.rank()] += shard.shard_sizes[0]
        assert rows_W == placement.rows_per_rank
        assert [shard.placement.rank() for shard in given.sharding_spec.shards] == given.ranks


def test_tables_that_can_be_balanced_are() -> None:
    equal = planned(Tables({f"t{i}": 10**6 for i in range(32)}), ranks(1, 8))
    assert spread(held_W(equal)) <= 1.2 and spread(equal.seconds_W) <= 1.2
    many = planned(Tables({f"t{i}": 10**5 + 5_000 * i for i in range(150)}), ranks(2, 8))
    assert spread(held_W(many)) <= 1.2 and spread(many.seconds_W) <= 1.2
    large = planned(Tables({f"t{i}": 10**7 for i in range(9)}), ranks(1, 8, gib=0.8))
    assert spread(held_W(large)) <= 1.2


def test_little_room_cuts_large_tables_and_only_those() -> None:
    topology, small = ranks(1, 4, gib=0.5), {f"small{i}": 10_000 for i in range(8)}
    plan = planned(Tables({"large": 20 * 10**6, **small}), topology)
    found = {table: placement.sharding for table, placement in plan.placements["bags"].items()}
    assert found == {"large": "row_wise", **dict.fromkeys(small, "table_wise")}
    assert max(held_W(plan)) <= 0.5 * GIB
    roomy = planned(Tables({"large": 20 * 10**6, **small}), ranks(1, 4))
    assert roomy.placements["bags"]["large"].sharding == "table_wise"


def test_what_is_reserved_is_not_filled() -> None:
    model, topology = Tables({f"t{i}": 10**7 for i in range(4)}), ranks(1, 2, gib=4)
    whole = planned(model, topology)
    assert {placement.sharding for placement in whole.placements["bags"].values()} == {"table_wise"}
    reserved = 4 * GIB - max(held_W(whole))
    assert planned(model, topology, reserved).placements == whole.placements
    with pytest.raises(NoRoom) as refusal:
        planned(model, topology, reserved + GIB)
    assert 0 < refusal.value.missing_bytes <= GIB


def test_slow_links_between_nodes_are_shared_by_the_ranks_of_one() -> None:
    model, topology = Tables({"one": 10**6, "two": 10**6}), ranks(8, 4, between_gb_s=10.0)
    plan = planned(model, topology)
    assert {placement.sharding for placement in plan.placements["bags"].values()} == {"table_row_wise"}
    whole = planned(model, topology, shardings=())
    assert {placement.sharding for placement in whole.placements["bags"].values()} == {"table_wise"}
    assert max(plan.seconds_W) < max(whole.seconds_W) / 2


@pytest.mark.parametrize(
    ("sharding", "hits", "sums_home"),
    [
        # 4 ranks in 2 nodes, 1,000 rows each, 3 ids a row; links of 100 GB/s inside and 10 between
        ("table_wise", 12_000, lambda size: size / 4 * 2 / 10e9),
        ("table_row_wise", 6_000, lambda size: size / 2 / 100e9 + size / 2 / 2 / 10e9),
        ("row_wise", 3_000, lambda size: size * 3 / 4 / (2 * 10e9)),
    ],
)
def test_time_and_bytes_are_those_of_the_formulas(sharding: str, hits: int, sums_home) -> None:
    rows, row = {"table_wise": 5_000, "table_row_wise": 2_500, "row_wise": 1_250}[sharding], 4 * DIM
    sums, ids = 4_000 * row, 8 * (hits + 4_000)
    size = rows * (row + 4) + ids + sums
    topology = ranks(2, 2, gib=(size + 1) / GIB, between_gb_s=10.0)
    rates = {"hit_read": 1e9, "row_read": 1e8, "hit_update": 5e8, "row_update": 2e7, "copy_rate": 4e9}
    curves = {name: Curve(points=[[row, rate]], source="estimated") for name, rate in rates.items()}
    machine = linked(H200.model_copy(update={"kind": "cpu", **curves}), 100.0)
    shardings = () if sharding == "table_wise" else (sharding,)
    plan = plan_id_tables(
        Tables({"t": 5_000}), SHARDERS, topology, machine, 1_000, 0, ids_per_row={"t": 3.0}, shardings=shardings
    )
    assert plan.placements["bags"]["t"].sharding == sharding
    assert max(plan.table_bytes_W) == rows * (row + 4) and max(plan.exchange_bytes_W) == ids + sums
    distinct = rows * (1 - (1 - 1 / 5_000) ** 12_000)
    look_up = hits / 1e9 + distinct / 1e8 + hits / 5e8 + distinct / 2e7 + 2 * sums / 4e9
    assert max(plan.seconds_W) == pytest.approx(look_up + ids / 4 * 2 / 10e9 + 2 * sums_home(sums))


def test_ids_on_few_rows_cost_no_more_than_their_hits() -> None:
    """As most tables of KuaiRand: a row that is hit again lies in a cache."""
    topology, ids_per_row = ranks(1, 1), {"t": 100.0}
    few, many = (
        planned(Tables({"t": rows}), topology, ids_per_row=ids_per_row).seconds_W[0] for rows in (10, 10_000_000)
    )
    hits, sums = 2048 * 100, 4 * DIM * 2048
    slower_read, slower_update = MACHINE.tbe
    passed = 2 * sums / MACHINE.copy_rate.at(sums)
    of_hits, of_rows = (
        slower_read * MACHINE.read_seconds(*asked, 4 * DIM) + slower_update * MACHINE.update_seconds(*asked, 4 * DIM)
        for asked in ((hits, 0), (0, hits))
    )
    assert few == pytest.approx(of_hits + passed, rel=1e-3)
    assert many == pytest.approx(of_hits + of_rows + passed, rel=0.02)


def test_each_kind_of_exchange_costs_its_latency_once() -> None:
    model, machine = Tables({"a": 1000, "b": 1000}), linked(H200, 350.0, latency=1.0)
    plan = plan_id_tables(model, SHARDERS, ranks(1, 2), machine, 1, 0)
    assert plan.seconds_W == pytest.approx([4.0, 4.0], rel=1e-3)
    assert plan_id_tables(model, SHARDERS, ranks(1, 1), machine, 1, 0).seconds_W[0] < 1e-3


def test_one_rank_holds_all() -> None:
    plan = planned(Tables({"a": 1000, "b": 10}, {"s": 3}), ranks(1, 1), rows=100)
    assert {p.sharding for tables in plan.placements.values() for p in tables.values()} == {"table_wise"}
    assert plan.table_bytes_W == [1013 * (4 * DIM + 4)]
    assert plan.exchange_bytes_W == [2 * (16 + 4 * DIM) * 100 + (8 + 4 * DIM) * 100]


def test_sixteen_bit_rows_keep_a_float32_state_and_plain_sgd_none() -> None:
    config = EmbeddingBagConfig(**config_of("t", 1000), data_type=DataType.FP16)
    model = nn.ModuleDict({"bags": EmbeddingBagCollection([config], device=torch.device("meta"))})
    assert planned(model, ranks(1, 1)).table_bytes_W == [1000 * (2 * DIM + 4)]
    plan = plan_id_tables(model, [EmbeddingBagCollectionSharder()], ranks(1, 1), MACHINE, 1, 0)
    assert plan.table_bytes_W == [1000 * 2 * DIM]
    unknown = [EmbeddingBagCollectionSharder(fused_params={"optimizer": EmbOptimType.LAMB})]
    with pytest.raises(InputError, match="bags: what .* keeps of a row is not known"):
        plan_id_tables(model, unknown, ranks(1, 1), MACHINE, 1, 0)


def test_tables_of_attention_lie_on_every_rank() -> None:
    model = Tables({"bag": 100}, {"sequence": 9})
    placement = planned(model, ranks(1, 3)).placements["sequences"]["sequence"]
    assert placement.sharding == "row_wise" and placement.rows_per_rank == [3, 3, 3]
    with pytest.raises(InputError, match="'sequence' is read as sequences, and its 9 rows leave a rank of 4 without"):
        planned(model, ranks(1, 4))


def test_memories_are_left_out() -> None:
    model = Tables({"bag": 100})
    model.memory = MemoryValues(64, 4, init_std=1.0, seed=0, device="meta")
    plan = plan_id_tables(model, [MemoryValuesSharder(), *SHARDERS], ranks(1, 2), MACHINE, 1, 0)
    assert list(plan.placements) == list(plan.sharding.plan) == ["bags"]
    none = plan_id_tables(nn.Linear(2, 2), SHARDERS, ranks(1, 2), MACHINE, 1, 0)
    assert none.placements == {} and none.table_bytes_W == [0, 0] and none.seconds_W == [0.0, 0.0]


def test_too_little_room_is_told_to_the_byte() -> None:
    model, topology = Tables({"large": 1000, "small": 10}), ranks(1, 1, gib=1.0)
    need = held_W(planned(model, topology))[0]
    with pytest.raises(NoRoom, match=r"rank 0 lacks 7 B, mostly for bags.large") as refusal:
        planned(model, topology, reserved=GIB - need + 7)
    assert (refusal.value.missing_bytes, refusal.value.rank, refusal.value.table) == (7, 0, "bags.large")
    with pytest.raises(NoRoom) as refusal:  # more is reserved than there is
        planned(criteo(), ranks(64, 8), reserved=81 * GIB)
    assert refusal.value.missing_bytes > GIB


def test_the_same_input_gives_the_same_plan_without_a_word(caplog, capfd) -> None:
    with caplog.at_level(logging.WARNING):
        first = planned(criteo(), ranks(8, 8, gib=1.0))
        again = plan_id_tables(criteo(), SHARDERS[::-1], ranks(8, 8, gib=1.0), MACHINE, 2048, 0)
    assert first == again
    assert not caplog.records and capfd.readouterr() == ("", "")


MIXED = ({"huge": 60_000, "large": 20_000, "b": 4_000, "c": 3_000, "tiny": 1}, {"sequence": 8_000})
MIXED_ROOM = 2 * 2**20  # too little for half of "huge", and for all of "large"


def ids_of(rank: int) -> KeyedJaggedTensor:
    """Three rows of 0 to 2 ids a feature; rank 1 has one."""
    generator, rows = torch.Generator().manual_seed(rank), 1 if rank == 1 else 3
    tables = {**MIXED[0], **MIXED[1]}
    lengths = torch.randint(0, 3, (len(tables) * rows,), generator=generator)
    ids = [
        torch.randint(0, size, (int(lengths[i * rows : (i + 1) * rows].sum()),), generator=generator)
        for i, size in enumerate(tables.values())
    ]
    return KeyedJaggedTensor(keys=list(tables), values=torch.cat(ids), lengths=lengths)


def loss_of(bags: dict[str, Tensor], sequences: dict[str, Tensor]) -> Tensor:
    return sum((values**2).sum() for values in [*bags.values(), *sequences.values()])


def bytes_of_look_ups(tables: nn.Module) -> int:
    """Of all tensors that FBGEMM holds on this rank."""
    parts = [part for sharded in tables.children() for lookup in sharded._lookups for part in lookup.modules()]
    storages = {}
    for part in parts:
        if isinstance(part, SplitTableBatchedEmbeddingBagsCodegen):
            for tensor in [*part.parameters(), *part.buffers(), *vars(part).values()]:
                if isinstance(tensor, Tensor):
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def one_step(rank: int, world: int) -> dict:
    """Plan, shard and train one step of mixed placements, as 2 nodes of 2 ranks."""
    set_use_sync_collectives(True)  # as batches of different sizes need on gloo
    logging.getLogger("torchrec.distributed.comm").setLevel(logging.ERROR)
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank % 2)}
    torch.manual_seed(0)
    plain = Tables(*MIXED, device="cpu")
    start = {name: value.detach().clone() for name, value in plain.named_parameters()}
    topology = ranks(2, 2, gib=MIXED_ROOM / GIB, between_gb_s=1.0)
    plan = plan_id_tables(Tables(*MIXED), SHARDERS, topology, MACHINE.model_copy(update={"kind": "cpu"}), 3, 0)
    model = DistributedModelParallel(
        Tables(*MIXED), device=torch.device("cpu"), plan=plan.sharding, sharders=SHARDERS, init_data_parallel=False
    )
    held = [(name, part) for name, value in model.state_dict().items() for part in value.local_shards()]
    for name, part in held:
        part.tensor.copy_(start[name][part.metadata.shard_offsets[0] :][: len(part.tensor)])
    bags, sequences = model(ids_of(rank))
    (world * loss_of(bags, sequences)).backward()  # TorchRec averages over ranks

    expected_bags, expected_sequences = plain(ids_of(rank))
    close = {name: torch.allclose(bags[name], value, atol=1e-5) for name, value in expected_bags.items()}
    close |= {name: torch.allclose(sequences[name], value, atol=1e-5) for name, value in expected_sequences.items()}
    sum(loss_of(*plain(ids_of(other))) for other in range(world)).backward()
    for name, part in held:
        rows = slice(part.metadata.shard_offsets[0], part.metadata.shard_offsets[0] + len(part.tensor))
        gradient = plain.get_parameter(name).grad[rows]
        step = RATE * gradient / (gradient.square().mean(1, keepdim=True).sqrt() + EPS)
        close[f"updated {name}"] = torch.allclose(part.tensor, start[name][rows] - step, atol=1e-4)
    shardings = {table: placement.sharding for table, placement in plan.placements["bags"].items()}
    bytes_here = plan.table_bytes_W[rank], bytes_of_look_ups(model.module)
    result = {"close": close, "sharding": shardings, "bytes": bytes_here}
    del model, held, bags, sequences
    gc.collect()
    return result


def test_a_mixed_plan_trains_like_plain_tables_and_takes_the_bytes_it_says() -> None:
    for found in run_ranks(one_step, 4):
        assert found["sharding"]["huge"] == "row_wise" and found["sharding"]["large"] == "table_row_wise"
        assert found["sharding"]["tiny"] == "table_wise"
        assert all(found["close"].values()), found
        predicted, measured = found["bytes"]
        assert predicted == pytest.approx(measured, rel=0.01)
