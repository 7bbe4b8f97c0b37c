"""A state saved on four ranks is the same state on any number of them, and trains on to the same losses."""

from __future__ import annotations

import gc
import threading
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_training import STEPS, batches_of_rank
from torch import Tensor
from torchrec.distributed.comm_ops import set_use_sync_collectives

from msn_dist.config import MemoryConfig, TrainingConfig, ValueOptimizerConfig
from msn_dist.errors import InputError
from msn_dist.memory import Placement
from msn_dist.memory.values import VALUE_DTYPES
from msn_dist.planner import plan
from msn_dist.training import checkpoint, checkpoint_parts
from msn_dist.training.checkpoint import Checkpoints, load_checkpoint, read, save_checkpoint, tensors_in
from msn_dist.training.growth import grow
from msn_dist.training.ranks import Ranks, joined_ranks
from msn_dist.training.run_directory import RunDirectory
from msn_dist.training.trainer import Trainer
from ranks import run_ranks
from tiny_data import MEMORY, SCHEMA, config_of, write_data

SAVED_AFTER = 3  # of the six steps
GROWN = 13  # sub-keys
LOADED_AS = {  # strategies by world size
    1: ["row_pooled"],
    2: ["row_pooled", "column"],
    3: ["row_pooled", "replicated"],
    4: ["row_pooled"],
    8: ["row_pooled"],
}
PIECE = 512  # bytes, of which even these tables have many
OTHER_KINDS = ["sgd", "rowwise_adam"]  # than row-wise Adagrad, of the values' optimizer
OTHERS_LOADED_AS = {2: "column", 3: "replicated"}
LOADED = [(world, strategy) for world, strategies in LOADED_AS.items() for strategy in strategies]


def trainer_of(
    folder: Path,
    ranks: Ranks,
    seed: int = 5,
    strategy: str = "row_pooled",
    value_dtype: str = "fp32",
    optimizer: str = "rowwise_adagrad",
) -> Trainer:
    memory = MEMORY | {"strategy": strategy, "value_dtype": value_dtype}
    config = config_of(folder / "data", "msn_ffn", memory=memory, seed=seed)
    values = ValueOptimizerConfig(kind=optimizer)
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"values": values})})
    return Trainer(config, SCHEMA, RunDirectory(folder), ranks)


def train(trainer: Trainer, folder: Path, steps: range) -> list[float]:
    """This rank's loss in each of these steps."""
    batches = batches_of_rank(folder / "data", trainer.ranks.world, trainer.ranks.rank)
    trainer.model.train()
    losses = []
    for trainer.step in steps:
        batch = batches[trainer.step].to(trainer.ranks.device)
        losses.append(trainer._train_step(batch, STEPS[trainer.step]).item())
    return losses


def hashes(trainer: Trainer) -> dict[str, list[str]]:
    """Of values and their optimizer's state in every memory, in 16 ranges of slots, in the order of slots.

    A collective call.
    """
    found = {}
    for name, values in trainer.memories.items():
        slots = values.placement.row_of(torch.arange(values.slots))
        state = values.fused_optimizer.state_dict()["state"].get("weight", {}).copy()
        if "step" in state:
            found[f"{name} step"] = [str(state.pop("step").item())]
        for kind, tensor in {"weight": values.state_dict()["weight"], **state}.items():
            in_order = tensor.full_tensor().cpu()[slots].float()  # NumPy has no bfloat16
            found[f"{name} {kind}"] = [sha256(part.numpy().tobytes()).hexdigest() for part in in_order.tensor_split(16)]
    return found


def save_and_train_on(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Two saves in the background, held up until training has gone on."""
    path, found = folder / "checkpoint", {}
    held, write_data = threading.Event(), checkpoint._Replacing.write_data

    def write_later(writer: Any, *arguments: Any) -> Any:
        assert held.wait(60)
        return write_data(writer, *arguments)

    checkpoint._Replacing.write_data = write_later
    checkpoints = Checkpoints(path, trainer.ranks)
    train(trainer, folder, range(SAVED_AFTER - 1))
    checkpoints.save(trainer.model, trainer.optimizers, print)
    train(trainer, folder, range(SAVED_AFTER - 1, SAVED_AFTER))
    found["before the first is complete"] = path.exists()
    held.set()
    checkpoints.wait()
    first = (path / ".metadata").read_bytes()

    held.clear()
    checkpoints.save(trainer.model, trainer.optimizers, print)
    found["hashes"] = hashes(trainer)
    found["losses"] = train(trainer, folder, range(SAVED_AFTER, len(STEPS)))
    found["before the second is complete"] = (path / ".metadata").read_bytes() == first
    held.set()
    checkpoints.wait()
    found["hashes at the end"] = hashes(trainer)
    found["folders"] = sorted(entry.name for entry in folder.iterdir())
    return found


def save_at_once(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Two saves by a host that has no room for a copy."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "free_host_bytes", lambda: 0)
        checkpoints = Checkpoints(folder / "at once", trainer.ranks)
        for _ in range(2):
            assert checkpoints.save(trainer.model, trainer.optimizers, said.append) is None
    found = {"hashes": hashes(trainer), "said": said, "seconds": checkpoints.seconds}
    train(trainer, folder, range(SAVED_AFTER, len(STEPS)))  # into the same tensors
    return found


def at_one_world_size(rank: int, world: int, folder: Path) -> dict[str, Any]:
    set_use_sync_collectives(True)  # as joined_ranks does
    plan._ROW_WISE_FROM = 35  # so that an id table is cut by rows
    checkpoint_parts.PIECE = PIECE
    ranks = Ranks(rank, world, world, torch.device("cpu"), dist.group.WORLD, dist.group.WORLD)
    found = {}
    if world == 4:
        trainer = trainer_of(folder, ranks)
        found["saved"] = save_and_train_on(trainer, folder)
        del trainer
        gc.collect()
        trainer = trainer_of(folder, ranks)
        train(trainer, folder, range(SAVED_AFTER))
        found["at once"] = save_at_once(trainer, folder)
        load_checkpoint(folder / "at once", trainer.model, trainer.optimizers, ranks)
        found["at once, loaded"] = hashes(trainer)
        del trainer
        gc.collect()
        trainer = trainer_of(folder, ranks, value_dtype="bf16")
        train(trainer, folder, range(SAVED_AFTER))
        save_checkpoint(folder / "16 bits", trainer.model, trainer.optimizers, ranks)
        found["16 bits"] = hashes(trainer)
        del trainer
        gc.collect()
        for kind in OTHER_KINDS:
            trainer = trainer_of(folder, ranks, optimizer=kind)
            train(trainer, folder, range(SAVED_AFTER))
            save_checkpoint(folder / kind, trainer.model, trainer.optimizers, ranks)
            found[kind] = hashes(trainer)
            found[f"losses of {kind}"] = train(trainer, folder, range(SAVED_AFTER, len(STEPS)))
            del trainer
            gc.collect()
    for kind in OTHER_KINDS if world in OTHERS_LOADED_AS else []:
        trainer = trainer_of(folder, ranks, seed=99, strategy=OTHERS_LOADED_AS[world], optimizer=kind)
        load_checkpoint(folder / kind, trainer.model, trainer.optimizers, ranks)
        found[f"{kind}, loaded"] = hashes(trainer)
        found[f"losses of {kind}"] = train(trainer, folder, range(SAVED_AFTER, len(STEPS)))
        del trainer
        gc.collect()
    for strategy in LOADED_AS[world]:
        trainer = trainer_of(folder, ranks, seed=99, strategy=strategy, value_dtype="bf16")
        load_checkpoint(folder / "16 bits", trainer.model, trainer.optimizers, ranks)
        found[f"16 bits, {strategy}"] = hashes(trainer)
        train(trainer, folder, range(SAVED_AFTER, SAVED_AFTER + 1))
        del trainer
        gc.collect()
        trainer = trainer_of(folder, ranks, seed=99, strategy=strategy)
        load_checkpoint(folder / "checkpoint", trainer.model, trainer.optimizers, ranks)
        found[strategy] = {"hashes": hashes(trainer)}
        save_checkpoint(folder / f"{world} {strategy}", trainer.model, trainer.optimizers, ranks)
        found[strategy]["losses"] = train(trainer, folder, range(SAVED_AFTER, len(STEPS)))
        del trainer
        gc.collect()
    if world == 2:
        grow(folder / "16 bits", folder / "16 bits, grown", MemoryConfig(**MEMORY), GROWN, ranks)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    write_data(folder / "data")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """By world size, what each rank found; four ranks save, and all load."""
    return {world: run_ranks(at_one_world_size, world, folder) for world in (4, 1, 2, 3, 8)}


def test_what_is_saved_in_the_background_is_the_state_of_then(found) -> None:
    for of_rank in found[4]:
        saved = of_rank["saved"]
        assert saved["hashes"] != saved["hashes at the end"]
        assert of_rank["row_pooled"]["hashes"] == saved["hashes"]


def test_a_checkpoint_is_replaced_when_the_next_one_is_complete(found) -> None:
    for of_rank in found[4]:
        saved = of_rank["saved"]
        assert not saved["before the first is complete"]
        assert saved["before the second is complete"]
        assert saved["folders"] == ["checkpoint", "data"]


def test_a_host_without_room_for_a_copy_writes_at_once_and_says_so_once(found) -> None:
    for of_rank in found[4]:
        saved = of_rank["at once"]
        (note,) = saved["said"]
        assert note.startswith("note: training waits while a checkpoint is written: a copy of the state takes ")
        assert note.endswith("of a node's memory, and 0 B is free")
        assert saved["seconds"] > 0
        assert of_rank["at once, loaded"] == saved["hashes"] == of_rank["saved"]["hashes"]


def test_a_rank_writes_its_part_of_a_table_in_pieces(folder: Path, found) -> None:
    with joined_ranks(TrainingConfig(device="cpu")) as ranks:
        stored = tensors_in(folder / "checkpoint", ranks)
    for name in (name for name in stored if name.endswith("values.weight")):
        slots, dim = stored[name].size
        pieces = sorted((chunk.offsets[0], chunk.sizes[0]) for chunk in stored[name].chunks)
        assert len(pieces) > 4 and max(rows for _, rows in pieces) == PIECE // (4 * dim)
        assert [start + rows for start, rows in pieces] == [start for start, _ in pieces[1:]] + [slots]


@pytest.mark.parametrize(("world", "strategy"), LOADED)
def test_values_of_16_bits_are_saved_and_loaded_as_they_are(world: int, strategy: str, found) -> None:
    saved = found[4][0]["16 bits"]
    assert all(saved[name] != of_32_bits for name, of_32_bits in found[4][0]["saved"]["hashes"].items())
    for of_rank in found[world]:
        assert of_rank[f"16 bits, {strategy}"] == saved


def values_of(path: Path, ranks: Ranks) -> list[Tensor]:
    return [tensor for name, tensor in contents(path, ranks).items() if name.endswith("values.weight")]


def test_values_of_16_bits_grow_as_16_bits(folder: Path, found) -> None:
    old, new = MEMORY["sub_keys"], GROWN
    old_slots = torch.arange(old**2)
    new_slots = old_slots // old * new + old_slots % old
    with joined_ranks(TrainingConfig(device="cpu")) as ranks:
        before, after = values_of(folder / "16 bits", ranks), values_of(folder / "16 bits, grown", ranks)
    for before_RD, after_RD in zip(before, after, strict=True):
        assert before_RD.dtype == after_RD.dtype == torch.bfloat16
        old_rows, new_rows = (Placement.permuted(n**2).row_of(s) for n, s in ((old, old_slots), (new, new_slots)))
        assert torch.equal(after_RD[new_rows], before_RD[old_rows])


@pytest.mark.parametrize(("stored", "value_dtype"), [("checkpoint", "fp16"), ("16 bits", "fp32"), ("16 bits", "fp16")])
def test_values_of_another_dtype_are_converted_and_the_console_is_told(
    stored: str, value_dtype: str, folder: Path, found, capsys: pytest.CaptureFixture
) -> None:
    dtype = VALUE_DTYPES[value_dtype]
    with joined_ranks(TrainingConfig(device="cpu")) as ranks:
        trainer = trainer_of(folder, ranks, seed=99, value_dtype=value_dtype)
        load_checkpoint(folder / stored, trainer.model, trainer.optimizers, ranks)
        for values, expected_RD in zip(trainer.memories.values(), values_of(folder / stored, ranks), strict=True):
            assert values.weight.dtype == dtype
            assert torch.equal(values.weight, expected_RD.to(dtype))
        del trainer, values
    was, is_now = str(expected_RD.dtype).removeprefix("torch."), str(dtype).removeprefix("torch.")
    notes = capsys.readouterr().out.splitlines()
    assert len(notes) == 2
    for note in notes:
        assert note.startswith(f"note: {folder / stored}: ")
        assert note.endswith(f"memory.values.weight was {was} and becomes {is_now}")


@pytest.mark.parametrize(("world", "strategy"), LOADED)
def test_values_and_their_optimizer_state_are_the_same_slot_by_slot(world: int, strategy: str, found) -> None:
    saved = found[4][0]["saved"]["hashes"]
    assert sorted(saved) == ["layer0 moment", "layer0 weight", "layer2 moment", "layer2 weight"]
    assert all(len(set(of_ranges)) == 16 for of_ranges in saved.values())
    for of_rank in found[world]:
        assert of_rank[strategy]["hashes"] == saved


def test_what_was_loaded_is_saved_again_bit_by_bit(folder: Path, found) -> None:
    """All of it: id tables, dense parameters, AdamW's state."""
    with joined_ranks(TrainingConfig(device="cpu")) as ranks:
        saved = contents(folder / "checkpoint", ranks)
        for world, strategy in LOADED:
            again = contents(folder / f"{world} {strategy}", ranks)
            assert again.keys() == saved.keys()
            assert [name for name, tensor in saved.items() if not torch.equal(again[name], tensor)] == []


def contents(path: Path, ranks: Ranks) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole."""
    state = {name: torch.empty(t.size, dtype=t.properties.dtype) for name, t in tensors_in(path, ranks).items()}
    read(path, state, ranks)
    return state


@pytest.mark.parametrize(("world", "strategy"), LOADED)
def test_training_goes_on_to_the_losses_of_a_run_that_was_not_interrupted(world: int, strategy: str, found) -> None:
    expected = [sum(of_ranks) for of_ranks in zip(*(r["saved"]["losses"] for r in found[4]), strict=True)]
    losses = [sum(of_ranks) for of_ranks in zip(*(r[strategy]["losses"] for r in found[world]), strict=True)]
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("world", OTHERS_LOADED_AS)
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_the_state_of_every_optimizer_of_values_is_loaded_and_trained_on(kind: str, world: int, found) -> None:
    saved = found[4][0][kind]
    state = {"sgd": [], "rowwise_adam": ["first_moment", "moment", "step"]}[kind]
    assert sorted(saved) == [f"{layer} {name}" for layer in ("layer0", "layer2") for name in [*state, "weight"]]
    assert saved.get("layer0 step", ["3"]) == ["3"]
    assert all(of_rank[f"{kind}, loaded"] == saved for of_rank in found[world])
    expected, losses = (
        [sum(of_ranks) for of_ranks in zip(*(of_rank[f"losses of {kind}"] for of_rank in found[size]), strict=True)]
        for size in (4, world)
    )
    assert losses == pytest.approx(expected, rel=1e-5)


def test_a_folder_that_cannot_be_written_or_read_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    state = {"model": {"weight": torch.ones(2)}}
    with joined_ranks(TrainingConfig(device="cpu")) as ranks:
        with pytest.raises(InputError, match="file/checkpoint: the checkpoint cannot be written .*Not a directory"):
            checkpoint.write(tmp_path / "file" / "checkpoint", state, ranks)
        with pytest.raises(InputError, match="nowhere: the checkpoint cannot be read .*No such file"):
            read(tmp_path / "nowhere", state, ranks)
        with pytest.raises(InputError, match="nowhere: the checkpoint cannot be read .*No such file"):
            tensors_in(tmp_path / "nowhere", ranks)
        checkpoint.write(tmp_path / "checkpoint", state, ranks)
        file = max((tmp_path / "checkpoint").glob("*.distcp"), key=lambda path: path.stat().st_size)
        whole = file.read_bytes()
        for damaged in (whole[: len(whole) // 2], b"", b"\xff" * len(whole)):
            file.write_bytes(damaged)
            with pytest.raises(InputError, match=f"cannot be read .rank 0: {file} is truncated or damaged"):
                read(tmp_path / "checkpoint", state, ranks)
        file.unlink()
        with pytest.raises(InputError, match="checkpoint: the checkpoint cannot be read .*rank 0"):
            read(tmp_path / "checkpoint", state, ranks)


@pytest.mark.gpu
def test_on_a_gpu_too_the_state_of_then_is_saved_and_loaded(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    with joined_ranks(TrainingConfig(device="cuda")) as ranks, pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint._Replacing, "write_data", checkpoint._Replacing.write_data)  # to be undone
        trainer = trainer_of(tmp_path, ranks)
        saved = save_and_train_on(trainer, tmp_path)
        assert saved["hashes"] != saved["hashes at the end"]
        load_checkpoint(tmp_path / "checkpoint", trainer.model, trainer.optimizers, ranks)
        assert hashes(trainer) == saved["hashes"]
        assert train(trainer, tmp_path, range(SAVED_AFTER, len(STEPS))) == pytest.approx(saved["losses"], rel=1e-4)
        patch.setattr(checkpoint_parts, "PIECE", PIECE)
        at_once = save_at_once(trainer, tmp_path)
        load_checkpoint(tmp_path / "at once", trainer.model, trainer.optimizers, ranks)
        assert hashes(trainer) == at_once["hashes"]
        del trainer
