"""A memory grows from N to N' sub-keys an axis: old slots stay what and where they were, new ones start as copies."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.comm_ops import set_use_sync_collectives

from msn_dist.config import MemoryConfig, RunConfig, TrainingConfig
from msn_dist.errors import InputError
from msn_dist.memory import Memory, Placement, values
from msn_dist.training import growth, run
from msn_dist.training.checkpoint import read, tensors_in, write
from msn_dist.training.evaluation import evaluate
from msn_dist.training.growth import grow
from msn_dist.training.origin import Origin
from msn_dist.training.ranks import Ranks, joined_ranks
from msn_dist.training.run_directory import RunDirectory
from msn_dist.training.trainer import Trainer
from ranks import run_ranks
from tiny_data import MEMORY, SCHEMA, config_of, write_data

OLD, TOKENS, WIDTH = 5, 4, 8
CHUNK = 15 * WIDTH  # rows travel fifteen by fifteen


@dataclass(frozen=True)
class Case:
    share: str
    theta: str
    new: int  # sub-keys
    groups: int  # of tokens

    @property
    def memory(self) -> MemoryConfig:
        groups = self.groups if self.share == "group" else None
        return MemoryConfig(
            sub_keys=OLD, top_k=4, heads=2, key_dim=4, theta=self.theta, share=self.share, groups=groups
        )


CASES = {
    "twice as many": Case("all", "key", 10, 1),
    "one more": Case("token", "none", 6, TOKENS),
    "three times, and two": Case("token", "mix", 17, TOKENS),
    "of groups": Case("group", "mix", 10, 2),
}
Contents = dict[str, Tensor]


def memory_of(config: MemoryConfig, sub_keys: int = OLD, top_k: int = 4) -> Memory:
    return Memory(config.model_copy(update={"sub_keys": sub_keys, "top_k": top_k}), TOKENS, WIDTH, seed=1)


def checkpoint_of(case: Case) -> Contents:
    """As if a model with two memories had been trained; among the rest is a table with a misleading name."""
    torch.manual_seed(0)
    memories = {f"layers.{i}.memory": memory_of(case.memory) for i in (0, 2)}
    state = {"model.head.weight": torch.randn(3, 7), "model.tables.values.weight": torch.randn(25, 4)}
    for path, memory in memories.items():
        for name, parameter in memory.named_parameters():
            nn.init.normal_(parameter)
            state[f"model.{path}.{name}"] = parameter.detach()
            if name == "values.weight":
                kept = {
                    "moment": torch.rand(len(parameter)),
                    "first_moment": torch.rand_like(parameter),
                    "step": torch.tensor(7),
                }
                state |= {f"fused_optimizer.state.{path}.{name}.{part}": tensor for part, tensor in kept.items()}
                continue
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"dense_optimizer.state.{path}.{name}.{moment}"] = torch.rand_like(parameter)
            state[f"dense_optimizer.state.{path}.{name}.step"] = torch.tensor(7.0)
    return state


def contents(path: Path, ranks: Ranks) -> Contents:
    """All tensors of a checkpoint, whole."""
    state = {name: torch.empty(t.size, dtype=t.properties.dtype) for name, t in tensors_in(path, ranks).items()}
    read(path, state, ranks)
    return state


def grow_all(folder: Path, ranks: Ranks) -> None:
    for name, case in CASES.items():
        grow(folder / name, folder / f"{name}, by {ranks.world}", case.memory, case.new, ranks, seed=3)


def config_to_start(folder: Path, sub_keys: int) -> RunConfig:
    """Of a run that starts from the one in the folder, not from its seed."""
    return config_of(folder / "data", "msn_ffn", seed=99, memory=MEMORY | {"sub_keys": sub_keys})


def valid_at_start(folder: Path, sub_keys: int, ranks: Ranks) -> dict[str, dict[str, float]]:
    config = config_to_start(folder, sub_keys)
    new = RunDirectory(folder / f"with {sub_keys} on {ranks.world}")
    ranks.together(lambda: new.path.mkdir() if ranks.rank == 0 else None)
    origin = Origin(folder / "run", config, ranks)
    trainer = Trainer(config, SCHEMA, new, ranks)
    origin.require_fit(trainer.model)
    origin.load(trainer.model, trainer.optimizers, new)
    return evaluate(trainer.model, trainer.valid_data, SCHEMA, ranks, "fp32")


def on_three_ranks(rank: int, world: int, folder: Path) -> dict[str, Any]:
    set_use_sync_collectives(True)  # as joined_ranks does
    ranks = Ranks(rank, world, world, torch.device("cpu"), dist.group.WORLD, dist.group.WORLD)
    growth._CHUNK = CHUNK
    grow_all(folder, ranks)
    found = {sub_keys: valid_at_start(folder, sub_keys, ranks) for sub_keys in (MEMORY["sub_keys"], 13)}
    gc.collect()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each case, and a run that has ended."""
    folder = tmp_path_factory.mktemp("growth")
    write_data(folder / "data")
    run.train(config_of(folder / "data", "msn_ffn"), folder / "run")
    with joined_ranks(TrainingConfig(device="cpu")) as ranks:
        for name, case in CASES.items():
            write(folder / name, checkpoint_of(case), ranks)
    return folder


@pytest.fixture(scope="module")
def on_three(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(on_three_ranks, 3, folder)


@pytest.fixture(scope="module")
def on_one(folder: Path) -> dict[str, Contents]:
    """What each case grows to."""
    with pytest.MonkeyPatch.context() as patch, joined_ranks(TrainingConfig(device="cpu")) as ranks:
        patch.setattr(growth, "_CHUNK", CHUNK)
        grow_all(folder, ranks)
        return {name: contents(folder / f"{name}, by 1", ranks) for name in CASES}


def by_slot(table: Tensor, groups: int, sub_keys: int) -> Tensor:
    """[groups, N, N, ...]: what lies in the rows, in the places of their slots."""
    slots = torch.arange(groups * sub_keys**2)
    return table[Placement.permuted(len(slots)).row_of(slots)].unflatten(0, (groups, sub_keys, sub_keys))


def parents(new: int) -> Tensor:
    return torch.arange(new) % OLD


@pytest.mark.parametrize("name", CASES)
def test_slots_keep_value_state_and_position_and_new_ones_are_copies(name: str, on_one) -> None:
    case, old, new = CASES[name], checkpoint_of(CASES[name]), on_one[name]
    tables = [key for key in old if "memory.values.weight" in key and not key.endswith("step")]
    assert len(tables) == 6  # two memories, their values and two moments
    for key in tables:
        before, after = by_slot(old[key], case.groups, OLD), by_slot(new[key], case.groups, case.new)
        assert torch.equal(after[:, :OLD, :OLD], before)
        assert torch.equal(after, before[:, parents(case.new)][:, :, parents(case.new)])


@pytest.mark.parametrize("name", CASES)
def test_old_sub_keys_stay_and_new_ones_are_close_to_their_parents(name: str, on_one) -> None:
    case, old, new = CASES[name], checkpoint_of(CASES[name]), on_one[name]
    noises = []
    for path in (f"layers.{layer}.memory.keys" for layer in (0, 2)):
        codes, keys = f"model.{path}.codes_AHNE", []
        assert torch.equal(new[codes][:, :, :OLD], old[codes])
        for state in (old, new):  # before LayerNorm
            mixing = state[f"model.{path}.theta"] if case.theta == "mix" else torch.eye(state[codes].shape[2])
            keys.append(mixing @ state[codes])
        before, after = keys
        torch.testing.assert_close(after[:, :, :OLD], before)
        parent = before[:, :, parents(case.new)[OLD:]]
        noises.append((after[:, :, OLD:] - parent) / parent.square().mean(-1, keepdim=True).sqrt())
    noise = torch.stack(noises)
    assert noise.square().mean().sqrt() == pytest.approx(growth.NOISE, rel=0.3)
    assert len(noise.flatten().unique()) == noise.numel(), "every new sub-key of every memory has its own"


@pytest.mark.parametrize("name", CASES)
def test_the_state_of_keys_grows_by_zeros_and_all_else_is_unchanged(name: str, on_one) -> None:
    case, old, new = CASES[name], checkpoint_of(CASES[name]), on_one[name]
    assert new.keys() == old.keys()
    changed = {key for key in old if old[key].shape != new[key].shape or not torch.equal(old[key], new[key])}
    grows = ["codes_AHNE", "memory.values.weight"] + ["theta"] * (case.theta == "mix")
    assert changed == {key for key in old if any(part in key for part in grows) and not key.endswith("step")}
    for key in changed:
        if key.startswith("dense_optimizer"):
            corner = tuple(map(slice, old[key].shape))
            assert torch.equal(new[key][corner], old[key])
            assert new[key].count_nonzero() == old[key].count_nonzero()


def test_three_ranks_grow_the_same_bits_as_one(folder: Path, on_one, on_three) -> None:
    with joined_ranks(TrainingConfig(device="cpu")) as ranks:
        for name in CASES:
            grown = contents(folder / f"{name}, by 3", ranks)
            assert grown.keys() == on_one[name].keys()
            assert [key for key, tensor in on_one[name].items() if not torch.equal(grown[key], tensor)] == []


@pytest.mark.parametrize("name", ["twice as many", "of groups"])
def test_without_noise_and_with_four_times_the_top_k_a_memory_gives_the_same(
    name: str, folder: Path, tmp_path: Path
) -> None:
    case = CASES[name]
    with joined_ranks(TrainingConfig(device="cpu")) as ranks:
        grow(folder / name, tmp_path / "grown", case.memory, case.new, ranks, noise=0.0)
        state = contents(tmp_path / "grown", ranks)
    memories = memory_of(case.memory, top_k=2), memory_of(case.memory, case.new, top_k=8)
    for memory, tensors in zip(memories, (checkpoint_of(case), state), strict=True):
        prefix = "model.layers.0.memory."
        memory.load_state_dict({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
    x_BTD = torch.randn(64, TOKENS, WIDTH)
    before, after = (memory(x_BTD) for memory in memories)
    torch.testing.assert_close(after, before)


def test_a_run_starts_from_another_with_more_sub_keys(
    folder: Path, on_three, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(values, "initial_values")  # which take long for a large table, and would be overwritten
    run.train(config_to_start(folder, 13), tmp_path / "run", folder / "run")
    started = RunDirectory.open(tmp_path / "run")
    assert sorted(path.name for path in started.path.iterdir() if path.is_dir()) == ["checkpoint", "tensorboard"]
    assert [record["run"] for record in started.records("init")] == [str(folder / "run")]
    first, *others = started.records("eval")
    assert first["step"] == 0 and [record["step"] for record in others][:-1] == [6]
    for of_rank in on_three:
        for task, expected in first["metrics"].items():
            assert of_rank[13][task] == pytest.approx(expected, rel=1e-5)


@pytest.mark.gpu
def test_a_run_on_a_gpu_starts_from_one_on_a_cpu(folder: Path, tmp_path: Path) -> None:
    on_cpu, on_gpu = (started_metrics(folder, tmp_path / device, device) for device in ("cpu", "cuda"))
    for task, expected in on_cpu.items():
        assert on_gpu[task] == pytest.approx(expected, rel=1e-3)


def started_metrics(folder: Path, path: Path, device: str) -> dict[str, Any]:
    """On the valid split, of a grown memory before its first step."""
    config = config_to_start(folder, 13).model_copy(update={"training": TrainingConfig(device=device, max_steps=6)})
    run.train(config, path, folder / "run")
    first, *_ = RunDirectory.open(path).records("eval")
    return first["metrics"]


def test_a_run_starts_where_another_was_best_at_any_world_size(folder: Path, on_three) -> None:
    best = RunDirectory.open(folder / "run").summary()["valid"]["tasks"]
    for of_rank in on_three:
        for task, expected in best.items():
            assert of_rank[MEMORY["sub_keys"]][task] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": MEMORY | {"sub_keys": 8}}, "memory.sub_keys=8: {run} has 9, and a memory can only grow"),
        (
            {"memory": MEMORY | {"sub_keys": 13, "key_dim": 4}},
            "{run}/checkpoint: is of another model; only memory.sub_keys may be larger than there: "
            "backbone.layers.0.memory.keys.codes_AHNE is (2, 2, 13, 8) there and (2, 2, 13, 4) here, ",
        ),
        (
            {"optimizer": {"values": {"kind": "sgd"}}},
            "optimizer.values.kind=sgd: {run} has the state of rowwise_adagrad; "
            "set optimizer.values.kind=rowwise_adagrad",
        ),
        ({"memory": MEMORY | {"theta": "none"}}, "keys.theta is (2, 2, 8, 8) there and missing here, "),
    ],
)
def test_a_start_that_does_not_fit_is_refused_and_leaves_no_folder(
    changes: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as refusal:
        run.train(config_of(folder / "data", "msn_ffn", **changes), tmp_path / "run", folder / "run")
    assert message.format(run=folder / "run") in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_a_start_from_what_is_no_run_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run directory"):
        run.train(config_of(folder / "data", "msn_ffn"), tmp_path / "run", folder / "data")


def test_a_memory_does_not_shrink(folder: Path, tmp_path: Path) -> None:
    memory = CASES["twice as many"].memory
    with (
        joined_ranks(TrainingConfig(device="cpu")) as ranks,
        pytest.raises(InputError, match="sub_keys=5: .* only grow"),
    ):
        grow(folder / "twice as many", tmp_path / "grown", memory, 5, ranks)
    assert not (tmp_path / "grown").exists()
