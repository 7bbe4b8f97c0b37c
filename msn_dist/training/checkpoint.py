"""Checkpoints by torch.distributed.checkpoint: written by all ranks, readable at any world size and with any strategy.

A checkpoint holds tensors under flat names: ``model.`` parameters and tables, ``fused_optimizer.state.`` what the
optimizers of the tables keep, ``dense_optimizer.state.`` what AdamW keeps.
"""

from __future__ import annotations

import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.utils._pytree import tree_leaves, tree_map
from torchrec.distributed.model_parallel import DistributedModelParallel

from msn_dist.errors import InputError
from msn_dist.training.checkpoint_parts import ByThreads, LoadParts, Part, SaveParts, in_parts, threads
from msn_dist.training.console import Console
from msn_dist.training.host_memory import free_host_bytes, lies_in_memory
from msn_dist.training.optimizers import Optimizers
from msn_dist.training.ranks import Ranks
from msn_dist.units import binary

_SHOWN = 3  # of the tensors that do not fit
_UNKNOWN = 2**62  # bytes, where the system does not say what is free
_SLACK = 1.1  # of a copy: something else takes memory too


class Checkpoints:
    """The checkpoint at `path`, a folder that all ranks see, written while training goes on where the host has room.

    Every method is a collective call.  What `path` holds is replaced only when the new state is complete.
    """

    def __init__(self, path: Path, ranks: Ranks) -> None:
        self.path, self._ranks = path, ranks
        # A group of its own: messages of the writing thread would mix with those of training.  It keeps torch's timeout
        # of half an hour: in the end each rank waits for the slowest disk.
        self._group = dist.new_group(backend="gloo")
        self._writing: Future | None = None
        self._started = 0.0
        self._told = False
        self.bytes = 0  # of all ranks, in the last checkpoint
        self.seconds: float | None = None  # from the call of `save` until it was written

    def save(self, model: DistributedModelParallel, optimizers: Optimizers, say: Callable[[str], None]) -> str | None:
        """Copy the state of model and optimizers to the host, and write the copy in the background.

        Where the host has no room for the copy, the state is written as it is before this returns, and `say` is told
        once.  Nothing is written, and the answer says why, where the storage has not the room.
        """
        self.wait()
        self._started = time.perf_counter()
        state = in_parts(_state(model, optimizers))
        if problem := self._why_no_room(state):
            return problem
        if problem := self._why_no_copy(state):
            if not self._told:
                say(f"note: training waits while a checkpoint is written: {problem}")
            self._told = True
            write(self.path, state, self._ranks, self._group)
            self._written()
            return None
        writer = _Replacing(self.path, self._ranks)
        self._writing = dcp.async_save(state, storage_writer=writer, planner=SaveParts(), process_group=self._group)
        self._writing.add_done_callback(self._written)
        return None

    def _written(self, _: Future | None = None) -> None:
        self.seconds = time.perf_counter() - self._started

    def _why_no_copy(self, state: dict[str, Any]) -> str | None:
        free = free_host_bytes()
        here = _local_bytes(state), -(_UNKNOWN if free is None else free), lies_in_memory(self.path.absolute())
        sizes = torch.tensor(here, dtype=torch.int64)
        dist.all_reduce(sizes, dist.ReduceOp.MAX, group=self._ranks.control)
        size, free = int(sizes[0]) * self._ranks.local_world, -int(sizes[1])
        files = size if sizes[2] else 0
        if _SLACK * size + files <= free:
            return None
        of_files = f", its files in {self.path.parent} as much again" if files else ""
        return f"a copy of the state takes {binary(size)} of a node's memory{of_files}, and {binary(free)} is free"

    def _why_no_room(self, state: dict[str, Any]) -> str | None:
        """The new state lies beside the old one until it is complete."""
        sizes = torch.tensor([_local_bytes(state), -shutil.disk_usage(self.path.parent).free])
        largest = sizes.clone()
        dist.all_reduce(sizes, group=self._ranks.control)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._ranks.control)  # all see one storage, or the fullest
        needed, free = int(sizes[0]), -int(largest[1])
        if needed <= free:
            self.bytes = needed
            return None
        return f"it takes {binary(needed)}, and {self.path.parent} has {binary(free)} free"

    def wait(self) -> None:
        """Return when the state that was saved last is at `path`; InputError if it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            with _explained(f"{self.path}: the checkpoint cannot be written"):
                writing.result()


def save_checkpoint(path: Path, model: DistributedModelParallel, optimizers: Optimizers, ranks: Ranks) -> None:
    """Write model, fused and dense optimizer state to `path`, a folder that all ranks see; a collective call.

    What `path` held is replaced only when the new state is complete.
    """
    write(path, _state(model, optimizers), ranks)


def load_checkpoint(path: Path, model: DistributedModelParallel, optimizers: Optimizers, ranks: Ranks) -> None:
    """Read what `save_checkpoint` wrote, at any world size and with any strategy, so that training can go on.

    A collective call.  The state has no step: learning rates follow from the step that the caller counts.  Values that
    were stored as another dtype are converted, fewer bits by rounding to the nearest, which the console is told.
    """
    optimizers.make_state()
    state = _state(model, optimizers)
    read(path, state, ranks)
    for change in _conversions(state["model"], tensors_in(path, ranks)):
        Console(ranks.rank, 0, 1).say(f"note: {path}: {change}")
    model.load_state_dict(state["model"])
    model.fused_optimizer.load_state_dict(state["fused_optimizer"])
    optimizers.dense.load_state_dict(state["dense_optimizer"])


def load_model(path: Path, model: DistributedModelParallel, ranks: Ranks) -> None:
    """Read the model's parameters, saved at any world size; a collective call."""
    state = {"model": model.state_dict()}
    read(path, state, ranks)
    model.load_state_dict(state["model"])


def write(path: Path, state: dict[str, Any], ranks: Ranks, group: dist.ProcessGroup | None = None) -> None:
    """Write any state, sharded or the same on all ranks, as `save_checkpoint` does; a collective call.

    `group` is to carry the messages, if not `ranks.control`.
    """
    writer = _Replacing(path, ranks)
    with _explained(f"{path}: the checkpoint cannot be written"):
        dcp.save(state, storage_writer=writer, planner=SaveParts(), process_group=group or ranks.control)


def read(path: Path, state: dict[str, Any], ranks: Ranks) -> None:
    """Read into the tensors of `state`, however they were sharded when they were written; a collective call."""
    tensors_in(path, ranks)  # explains a folder without a checkpoint, which torch would log at length
    with _explained(f"{path}: the checkpoint cannot be read"):
        reader = ByThreads(path, threads(ranks.local_world))
        dcp.load(state, storage_reader=reader, planner=LoadParts(), process_group=ranks.control)


def tensors_in(path: Path, ranks: Ranks) -> dict[str, TensorStorageMetadata]:
    """Shape and dtype of every tensor of a checkpoint, by its flat name; InputError if it cannot be read."""

    def metadata() -> Metadata:
        try:
            return dcp.FileSystemReader(path).read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise InputError(f"{path}: the checkpoint cannot be read ({error})") from None

    return ranks.together(metadata).state_dict_metadata


def require_shapes(model: DistributedModelParallel, shapes: Mapping[str, torch.Size], place: Path, rule: str) -> None:
    """InputError, which names what differs, unless the checkpoint at `place` with these `shapes` is one of `model`.

    `rule` is what the user has to keep.
    """
    here = {f"model.{name}": tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    there = {name: tuple(shape) for name, shape in shapes.items() if name.startswith("model.")}
    different = [name for name in sorted(here | there) if here.get(name) != there.get(name)]
    if different:
        lines = [
            f"{name.removeprefix('model.')} is {there.get(name, 'missing')} there and {here.get(name, 'missing')} here"
            for name in different[:_SHOWN]
        ]
        more = [f"and {len(different) - _SHOWN} more differ"] * (len(different) > _SHOWN)
        raise InputError(f"{place}: is of another model; {rule}: {', '.join(lines + more)}")


def _conversions(state: Mapping[str, Tensor], stored: Mapping[str, TensorStorageMetadata]) -> list[str]:
    """Which tensors were not stored as the dtype that they are read as."""
    dtypes = {name: stored[f"model.{name}"].properties.dtype for name in state}
    return [
        f"{name} was {dtypes[name]} and becomes {tensor.dtype}".replace("torch.", "")
        for name, tensor in state.items()
        if dtypes[name] != tensor.dtype
    ]


def _local_bytes(state: dict[str, Any]) -> int:
    """Of this rank's parts of tables, and of what all ranks have on the one that writes it."""
    first = dist.get_rank() == 0
    return sum(
        leaf.bytes if isinstance(leaf, Part) else leaf.nbytes
        for leaf in tree_leaves(state)
        if (isinstance(leaf, Part) and (first or not leaf.shared)) or (isinstance(leaf, Tensor) and first)
    )


def _state(model: DistributedModelParallel, optimizers: Optimizers) -> dict[str, Any]:
    return {
        "model": model.state_dict(),
        "fused_optimizer": model.fused_optimizer.state_dict(),
        "dense_optimizer": optimizers.dense.state_dict(),
    }


class _Replacing(dcp.FileSystemWriter):
    """Writes a draft beside `path`, which takes its place when all ranks have written their parts."""

    def __init__(self, path: Path, ranks: Ranks) -> None:
        draft = path.with_name(path.name + ".draft")
        if ranks.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed
        dist.barrier(group=ranks.control)
        super().__init__(draft, thread_count=threads(ranks.local_world))
        self._place = path

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A copy on the host.  The base class would make two, one after the other."""
        return tree_map(_on_host, state_dict)

    def finish(self, metadata: Metadata, results: list) -> None:
        """Called on one rank, when all have written; the others' calls return after it."""
        super().finish(metadata, results)
        old = self._place.with_name(self._place.name + ".old")
        if self._place.exists():
            self._place.rename(old)
        Path(self.path).rename(self._place)
        shutil.rmtree(old, ignore_errors=True)


def _on_host(leaf: Any) -> Any:
    if isinstance(leaf, Part):
        return leaf.on_host()
    return leaf.to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf


@contextmanager
def _explained(failure: str) -> Iterator[None]:
    """What a rank could not read or write is raised on all of them: as InputError if it is the storage's fault."""
    try:
        yield
    except CheckpointException as error:  # not an Exception
        causes = {rank: cause for rank, (cause, _) in error.failures.items()}
        rank, cause = next(iter(causes.items()))
        if all(isinstance(cause, OSError) for cause in causes.values()):
            raise InputError(f"{failure} (rank {rank}: {cause})") from None
        raise RuntimeError(f"{failure}\n{error}") from None
