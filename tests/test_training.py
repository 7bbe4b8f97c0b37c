"""Training is the same at any world size; so are checkpoints, and the bytes on the wire are those of the formula."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.comm_ops import set_use_sync_collectives
from torchrec.optim.optimizers import in_backward_optimizer_filter

from msn_dist.config import (
    DLRMConfig,
    RunConfig,
)
from msn_dist.data.batch import Batch
from msn_dist.data.row_group import RowGroup, open_file, read_row_group
from msn_dist.data.table import as_batch
from msn_dist.errors import InputError
from msn_dist.planner import plan
from msn_dist.training.checkpoint import load_model, save_checkpoint
from msn_dist.training.evaluation import evaluate, open_split
from msn_dist.training.ranks import Ranks
from msn_dist.training.run_directory import RunDirectory
from msn_dist.training.sharded_model import build_sharded_model, id_table_shards, sharded_memories
from msn_dist.training.trainer import Trainer
from ranks import run_ranks
from tiny_data import MODELS, ROW_GROUPS, SCHEMA, config_of, write_data

STEPS = [40, 30, 7, 33, 24, 40]  # rows of each global batch
EMPTY_STEP = 3  # in which the last rank has no rows
TABLES = ["user", "item", "layer0"]  # of the dlrm
Parts = dict[tuple[str, int], Tensor]  # (table, first row) -> the rows that a rank holds


def rows_of_ranks(rows: int, world: int, step: int) -> list[slice]:
    """An uneven deal of a global batch to the ranks."""
    takers = world - 1 if world > 1 and step == EMPTY_STEP else world
    ends = [rows * (rank + 1) ** 2 // takers**2 for rank in range(takers)] + [rows] * (world - takers)
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def batches_of_rank(data: Path, world: int, rank: int) -> list[Batch]:
    path = data / "train" / "part-0.parquet"
    groups = [RowGroup(path, index, rows) for index, rows in enumerate(ROW_GROUPS["train"])]
    table = read_row_group(groups[0], open_file(path, SCHEMA), SCHEMA)
    batches, first = [], 0
    for step, rows in enumerate(STEPS):
        mine = torch.arange(first, first + rows)[rows_of_ranks(rows, world, step)[rank]].numpy()
        batches.append(as_batch(table.take(mine, table.starts()).tensors(SCHEMA.sparse_keys), SCHEMA))
        first = (first + rows) % 100
    return batches


def parts_of(trained: nn.Module) -> Parts:
    """A copy of all that this rank holds: id tables, memory values, dense parameters."""
    parts = {(table, first_row): rows.clone() for table, _, first_row, rows in id_table_shards(trained)}
    for name, values in sharded_memories(trained).items():
        parts[name, values.exchange.rank * values.block] = values.weight.detach().clone()
    for name, parameter in in_backward_optimizer_filter(trained.named_parameters()):
        parts[name, 0] = parameter.detach().clone()
    return parts


def whole(parts_of_ranks: list[Parts]) -> dict[str, Tensor]:
    """The tables of a model, put together from the parts of all ranks."""
    rows = {}
    for parts in parts_of_ranks:
        for (name, first_row), part in parts.items():
            rows.setdefault(name, {})[first_row] = part
    return {name: torch.cat([parts[first] for first in sorted(parts)]) for name, parts in rows.items()}


def train_steps(trainer: Trainer, batches: list[Batch]) -> dict[str, Any]:
    """What is compared over world sizes, and the bytes that the exchanges should have counted."""
    found = {"start": parts_of(trainer.model), "losses": []}
    expected = Counter()
    for values in trainer.memories.values():
        values.register_forward_pre_hook(lambda values, inputs: expected.update(bytes_of_step(values, *inputs)))
    trainer.model.train()
    for batch, rows in zip(batches, STEPS, strict=True):
        found["losses"].append(trainer._train_step(batch, rows).item())
        trainer.step += 1
    found["end"] = parts_of(trainer.model)
    sent = [values.exchange.traffic.by_message() for values in trainer.memories.values()]
    found["bytes"] = sum((Counter(messages) for way in sent for messages in way.values()), Counter())
    found["expected bytes"] = Counter(expected)
    return found


def bytes_of_step(values: nn.Module, slots_ML: Tensor, weights_ML: Tensor) -> Counter:
    """What this rank's bags cost in one step of row_pooled; messages of a rank to itself are free."""
    others, bags = values.exchange.world - 1, len(slots_ML)
    away = int((values.placement.row_of(slots_ML) // values.block != values.exchange.rank).sum())
    return Counter(
        counts=others * 16,
        lengths=others * bags,
        hits=away * 8,
        hits_gradient=away * 4,
        pooled=others * bags * values.dim * 4,
        pooled_gradient=others * bags * values.dim * 4,
    )


def first_update(trainer: Trainer, batch: Batch, rows: int) -> dict[str, Any]:
    """How far (RMS) the first step moves each row of a table: row-wise Adagrad starts with exactly its rate."""
    before = parts_of(trainer.model)
    trainer.step = 1
    trainer._train_step(batch, rows)
    after = parts_of(trainer.model)
    moved = {key: (after[key] - part).square().mean(1).sqrt() for key, part in before.items() if key[0] in TABLES}
    return {"moved": moved, "rates": trainer.optimizers.rates(1)}


def at_one_world_size(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Everything below that takes ranks; what W = 2 saves, the other world sizes load."""
    set_use_sync_collectives(True)  # as joined_ranks does
    plan._ROW_WISE_FROM = 35  # so that an id table is cut by rows
    data, found = folder / "data", {}
    ranks = Ranks(rank, world, world, torch.device("cpu"), dist.group.WORLD, dist.group.WORLD)
    if world == 2:
        model = DLRMConfig(**MODELS["dlrm"], dropout=0.5)
        dropout = config_of(data, "dlrm").model_copy(update={"model": model})
        batches = batches_of_rank(data, world, rank)
        runs = [train_steps(Trainer(dropout, SCHEMA, RunDirectory(folder), ranks), batches) for _ in range(2)]
        found["with dropout"] = [run["losses"] for run in runs]
        for model in MODELS:
            mixed = config_of(data, model, training={"device": "cpu", "max_steps": len(STEPS), "precision": "bf16"})
            found["bf16", model] = train_steps(Trainer(mixed, SCHEMA, RunDirectory(folder), ranks), batches)["losses"]
        gc.collect()
    for model in MODELS:
        trainer = Trainer(config_of(data, model), SCHEMA, RunDirectory(folder), ranks)
        found[model] = train_steps(trainer, batches_of_rank(data, world, rank))
        if world == 2 and model == "msn_ffn":
            save_checkpoint(folder / "checkpoint", trainer.model, trainer.optimizers, ranks)
            found["restored"] = state_and_metrics(trainer.model, trainer.config, ranks)
        del trainer
        gc.collect()
    if world != 2:
        other_start = config_of(data, "msn_ffn", seed=99)
        model, *_ = build_sharded_model(other_start, SCHEMA, ranks)
        load_model(folder / "checkpoint", model, ranks)
        found["restored"] = state_and_metrics(model, other_start, ranks)
        del model
    trainer = Trainer(config_of(data, "dlrm"), SCHEMA, RunDirectory(folder), ranks)
    found["first update"] = first_update(trainer, batches_of_rank(data, world, rank)[0], STEPS[0])
    del trainer
    if world == 3:  # blocks of two rows: the third rank has none of the four
        with pytest.raises(InputError) as refusal:
            build_sharded_model(config_of(data, "dlrm", memory={"sub_keys": 2, "top_k": 2}), SCHEMA, ranks)
        found["refusal"] = str(refusal.value)
    gc.collect()
    return found


def state_and_metrics(model: nn.Module, config: RunConfig, ranks: Ranks) -> dict[str, Any]:
    data = open_split("test", config.data, SCHEMA, ranks)
    return {"parts": parts_of(model), "metrics": evaluate(model, data, SCHEMA, ranks, "fp32")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    write_data(folder / "data")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """By world size, what each rank found."""
    return {world: run_ranks(at_one_world_size, world, folder) for world in (2, 1, 3, 4)}


def of(found: dict[int, list[dict]], world: int, model: str, key: str) -> list[Any]:
    return [of_rank[model][key] for of_rank in found[world]]


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        explain = f"{name}: {{}}".format
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-4, msg=explain)


@pytest.mark.parametrize("model", MODELS)
def test_every_world_size_starts_with_the_same_bits(model: str, found) -> None:
    expected = whole(of(found, 1, model, "start"))
    assert {"user", "item", "layer0", "heads.weight"} <= expected.keys()
    for world in (2, 3, 4):
        start = whole(of(found, world, model, "start"))
        assert start.keys() == expected.keys()
        assert [name for name, tensor in expected.items() if not torch.equal(start[name], tensor)] == []


@pytest.mark.parametrize("model", MODELS)
def test_every_world_size_trains_to_the_same_losses_and_parameters(model: str, found) -> None:
    (losses,) = of(found, 1, model, "losses")
    start, end = whole(of(found, 1, model, "start")), whole(of(found, 1, model, "end"))
    assert all((end[name] - start[name]).abs().max() > 0.01 for name in TABLES), "a step must change what it reads"
    for world in (2, 3, 4):
        sums = [sum(of_ranks) for of_ranks in zip(*of(found, world, model, "losses"), strict=True)]
        assert sums == pytest.approx(losses, rel=1e-5)
        assert_close(whole(of(found, world, model, "end")), end)


def test_dropout_follows_the_seed_and_a_run_repeats_bit_for_bit(found) -> None:
    for of_rank in found[2]:
        first, second = of_rank["with dropout"]
        assert first == second
    assert of(found, 2, "dlrm", "losses") != [of_rank["with dropout"][0] for of_rank in found[2]]


@pytest.mark.parametrize("model", MODELS)
def test_mixed_precision_trains_to_nearly_the_same_losses(model: str, found) -> None:
    for of_rank in found[2]:
        assert of_rank["bf16", model] != of_rank[model]["losses"]
        assert of_rank["bf16", model] == pytest.approx(of_rank[model]["losses"], rel=0.03)


@pytest.mark.parametrize("model", MODELS)
def test_the_bytes_sent_are_those_of_row_pooled(model: str, found) -> None:
    assert of(found, 1, model, "bytes") == [Counter()]
    for world in (2, 3, 4):
        sent = sum(of(found, world, model, "bytes"), Counter())
        assert sent == sum(of(found, world, model, "expected bytes"), Counter())
        assert sent["hits"] > 0


def test_a_checkpoint_of_two_ranks_means_the_same_model_on_any_number(found) -> None:
    saved = [of_rank["restored"] for of_rank in found[2]]
    parts = whole([of_rank["parts"] for of_rank in saved])
    for world in (1, 3, 4):
        loaded = [of_rank["restored"] for of_rank in found[world]]
        rows = whole([of_rank["parts"] for of_rank in loaded])
        assert rows.keys() == parts.keys()
        assert [name for name, tensor in parts.items() if not torch.equal(rows[name], tensor)] == []
        for metrics in (of_rank["metrics"] for of_rank in loaded):
            for task in SCHEMA.labels:
                assert metrics[task] == pytest.approx(saved[0]["metrics"][task], rel=1e-6)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_tables_learn_at_their_own_rates(world: int, found) -> None:
    _, ids, values = found[world][0]["first update"]["rates"]
    moved = whole([of_rank["first update"]["moved"] for of_rank in found[world]])
    for table, rate in {"user": ids, "item": ids, "layer0": values}.items():
        hit_R = moved[table] > 0
        assert hit_R.any()
        torch.testing.assert_close(moved[table][hit_R], torch.full([int(hit_R.sum())], rate), rtol=0.01, atol=0)


def test_a_memory_that_leaves_a_rank_without_rows_is_refused_on_every_rank(found) -> None:
    refusal = "a memory of 4 slots leaves rank 2 of 3 without rows: use fewer ranks, or more memory.sub_keys"
    assert [of_rank["refusal"] for of_rank in found[3]] == [refusal] * 3
