"""The bytes that a run is predicted to take are those of its tensors, for every strategy, value dtype and block."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from exchange_cases import LookUpCase, counted
from storage_cases import DLRM, MEMORY, RANKMIXER, ROWS, SCHEMA, Measured, config_of, measured
from tensor_bytes import mark, tensor_bytes

from msn_dist.config import RunConfig
from msn_dist.planner.dense_trace import trace_step
from msn_dist.planner.exchange_storage import exchange_bytes
from msn_dist.planner.layout import Layout
from msn_dist.planner.load import Load
from msn_dist.planner.loopback import Distinct
from msn_dist.planner.plan import TableShards
from msn_dist.planner.storage import Storage, rank_storage
from msn_dist.sharding.strategies import STRATEGIES
from ranks import run_ranks

TOLERANCE = 0.03
BF16 = {"value_dtype": "bf16", "value_dim": 32}
SMOE = RANKMIXER | {"block": "msn_smoe"}
CASES: dict[int, dict[str, RunConfig]] = {
    1: {
        "ffn": config_of(1, RANKMIXER | {"block": "ffn", "dropout": 0.1}, None),
        "msn_ffn": config_of(1, RANKMIXER, MEMORY),
        "msn_smoe bf16": config_of(1, SMOE, MEMORY | BF16, "bf16"),
        "dlrm reference": config_of(1, DLRM, MEMORY | {"lookup": "reference"}),
        "chunks, attention": config_of(1, RANKMIXER | {"attention": True}, MEMORY | {"chunks": 2}),
        "sgd": config_of(1, RANKMIXER, MEMORY, optimizer="sgd"),
    },
    2: {
        **{strategy: config_of(2, RANKMIXER, MEMORY | {"strategy": strategy}) for strategy in STRATEGIES},
        "msn_smoe bf16 int8": config_of(2, SMOE, MEMORY | BF16 | {"wire": "int8"}, "bf16"),
        "dlrm bf16": config_of(2, DLRM, MEMORY | {"wire": "bf16", "strategy": "row_gather_unique"}, "bf16"),
        "attention": config_of(2, RANKMIXER | {"attention": True, "block": "gated_ffn"}, None),
        **{
            f"{strategy} adam": config_of(2, RANKMIXER, MEMORY | {"strategy": strategy}, optimizer="rowwise_adam")
            for strategy in ("row_pooled", "column", "replicated")
        },
    },
    3: {
        "row_pooled_sparse": config_of(3, RANKMIXER, MEMORY | {"strategy": "row_pooled_sparse", "share": "token"}),
        "column bf16": config_of(3, RANKMIXER, MEMORY | {"strategy": "column", "value_dtype": "bf16"}),
    },
}
EVERY = [(world, name) for world, cases in CASES.items() for name in cases]


def layout_of(config: RunConfig, world: int) -> Layout:
    memory = config.memory
    if memory is None:
        return Layout(world, world, "row_pooled")
    kind = config.optimizer.values.kind
    by_reference = memory.value_dtype != "fp32" or memory.strategy in ("column", "replicated") or kind == "rowwise_adam"
    lookup = "reference" if by_reference or memory.lookup == "reference" else "fbgemm"
    return Layout(world, world, memory.strategy, memory.wire, memory.value_dtype, lookup, kind)


def predicted(
    config: RunConfig, world: int, tables: list[TableShards], distinct: Distinct | None = None
) -> list[Storage]:
    trace = trace_step(config, SCHEMA, ROWS)
    return rank_storage(config, SCHEMA, layout_of(config, world), trace, tables, distinct)


@pytest.fixture(scope="module")
def found() -> dict[int, list[dict[str, Measured]]]:
    return {world: run_ranks(measured, world, cases) for world, cases in CASES.items()}


@pytest.mark.parametrize(("world", "name"), EVERY)
def test_predicted_bytes_are_those_of_the_tensors(world: int, name: str, found) -> None:
    for rank, of_rank in enumerate(found[world]):
        actual = of_rank[name]
        storage = predicted(CASES[world][name], world, actual.tables, actual.distinct)[rank]
        assert storage.values <= storage.allocated / 2, "the table hides what is to be tested"
        total = actual.between + actual.step
        step = storage.batch + storage.activations
        told = (
            f"rank {rank} of {world}, {name}: {storage.allocated:,} predicted, {total:,} measured\n"
            f"  between steps {storage.allocated - step:,} predicted, {actual.between:,} measured\n"
            f"  at the peak of a step {step:,} predicted, {actual.step:,} measured {actual.phases}\n  {asdict(storage)}"
        )
        assert abs(storage.allocated / total - 1) <= TOLERANCE, told


ALONE = [LookUpCase(strategy, wire=wire, lookup="auto") for strategy in STRATEGIES for wire in ("fp16", "int8")]
ALONE += [LookUpCase(strategy, lookup="auto", chunks=4) for strategy in STRATEGIES]
ALONE += [LookUpCase("replicated", lookup="auto", chunks=8, optimizer="rowwise_adam", slots=96**2)]
ALONE += [
    LookUpCase(strategy, lookup="auto", optimizer=optimizer, popular=500)
    for strategy, optimizer in (
        ("column", "rowwise_adagrad"),
        ("row_gather_unique", "rowwise_adagrad"),
        ("replicated", "rowwise_adam"),
    )
]


@pytest.fixture(scope="module")
def alone() -> dict[LookUpCase, dict[str, int]]:
    return dict(zip(ALONE, run_ranks(counted, 2, ALONE)[0], strict=True))


@pytest.mark.parametrize("case", ALONE, ids=str)
def test_a_look_up_alone_holds_what_its_trace_says(case: LookUpCase, alone) -> None:
    size = case.slots, case.dim, case.bags, case.hits
    lookup = "reference" if case.strategy in ("column", "replicated") else "fbgemm"
    layout = Layout(2, 1, case.strategy, case.wire, case.value_dtype, lookup, case.optimizer)
    load = Load.uniform(case.popular or case.slots, case.bags, case.hits).in_chunks(
        (case.bags // case.chunks,) * case.chunks
    )
    distinct = Distinct(round(load.rows_by_chunk(1)), round(load.rows(2)))
    held = exchange_bytes(layout, *size, chunks=case.chunks, distinct=distinct)
    actual = alone[case]
    assert held.keeps_output == (actual["output"] <= 0)
    assert held.kept + held.saved == pytest.approx(actual["saved"], rel=TOLERANCE)
    assert held.kept + held.forward == pytest.approx(actual["forward"], rel=TOLERANCE)
    assert held.backward == pytest.approx(actual["backward"], rel=TOLERANCE)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "rowwise_adam"])
@pytest.mark.parametrize("strategy", ["column", "replicated"])
def test_kernels_hold_no_gradient_a_hit_where_torch_steps_the_rows(strategy: str, optimizer: str) -> None:
    """By torch the look-up and its backward each have rows of all hits."""
    by_torch, by_kernels = (
        exchange_bytes(Layout(2, 2, strategy, lookup=lookup, optimizer=optimizer), 64**2, 64, 2048, 32)
        for lookup in ("reference", "triton")
    )
    hits = (2 if strategy == "column" else 1) * 2048 * 32
    row = 4 * (32 if strategy == "column" else 64)
    assert by_torch.forward - by_kernels.forward > hits * row
    assert by_torch.backward - by_kernels.backward > 0.5 * hits * row
    assert by_kernels.saved <= by_torch.saved


def paper_sized() -> RunConfig:
    model = {"tokens": 16, "width": 1024, "layers": 4, "block": "msn_ffn"}
    memory = {"sub_keys": 2**16, "value_dtype": "bf16", "value_dim": 16}
    return config_of(1, RANKMIXER | model, memory, "bf16")


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_a_large_model_is_traced_without_a_tensor(device_type: str) -> None:
    with tensor_bytes() as counted_bytes, mark("trace"):
        trace = trace_step(paper_sized(), SCHEMA, 2048, device_type)
    assert counted_bytes.peak("trace") < 2**20
    assert sum(trace.parameters) > 2**30
    assert max(span.live for span in trace.spans) > 2**31


def test_a_gpu_is_planned_for_without_one() -> None:
    config = paper_sized()
    trace = trace_step(config, SCHEMA, 2048, "cuda")
    names = {region: {op.name for op in trace.ops if op.region == region} for region in ("retrieval", "gate")}
    kernels = {"retrieval": {"retrieve", "axis_norm"}, "gate": {"gate"}}
    for region, forward in kernels.items():
        assert forward | {f"{name}_backward" for name in forward} <= names[region]
    assert not names["retrieval"] & {"gate", "gate_backward"} and not names["gate"] & {"retrieve", "retrieve_backward"}
    assert not {"aten.topk", "aten.tanh"} & set.union(*names.values())
    norms = {op.dtype for op in trace.ops if op.name == "aten.native_layer_norm"}
    assert norms == {"float32"}, "autocast on CUDA normalises in float32"
    layout = Layout(64, 8, "two_level", "bf16", "bf16", "triton")
    storages = rank_storage(config, SCHEMA, layout, trace)
    assert sum(storage.values for storage in storages) == 2 * 2**32 * 16 * 2
    assert all(storage.margin > 0 and storage.total == storage.allocated + storage.margin for storage in storages)
    assert all(storage.dense_gradients == 2 * storage.dense_parameters for storage in storages), "DDP's, old and new"


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        ("row_pooled", 8 * 32),
        ("row_pooled_sparse", 8 * 32),
        ("row_gather", 4 * 64 * 32),
        ("row_gather_unique", 4 * 64 * 16),
    ],
)
def test_the_busiest_owner_has_room_for_what_comes_to_it(strategy: str, more: int) -> None:
    """`more` bytes a bag at least where twice as much comes: hits and weights, or the rows that are owed."""
    bags = 4096
    mean, twice = (
        exchange_bytes(
            Layout(64, 8, strategy, lookup="triton"), 2**24, 64, bags, 32, distinct=Distinct(16 * bags, 64 * bags, load)
        )
        for load in (1.0, 2.0)
    )
    assert twice.forward - mean.forward >= more * bags
    assert twice.saved > mean.saved


def test_tables_lie_where_the_plan_says() -> None:
    config = CASES[2]["row_pooled"]
    tables = [
        TableShards("ids", "user", "ids", 5001, 16, "row_wise", [2501, 2500]),
        TableShards("ids", "city", "ids", 40, 16, "table_wise", [0, 40]),
        TableShards("backbone", "weight", "memory", 4096, 64, "row_pooled", [2048, 2048]),
    ]
    first, last = predicted(config, 2, tables)
    assert (first.id_tables, last.id_tables) == (2501 * 64, 2540 * 64)
    assert (first.id_state, last.id_state) == (2501 * 4, 2540 * 4)
    assert first.values == last.values == 2048 * 64 * 4
