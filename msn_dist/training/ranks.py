"""This process among its peers: process groups, device, start and end."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torchrec.distributed.comm_ops import set_use_sync_collectives
from torchrec.distributed.types import ShardingEnv

from msn_dist.config import TrainingConfig
from msn_dist.errors import InputError
from msn_dist.sharding import flight_record
from msn_dist.training.last_words import last_words

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """What a rank must know of the world."""

    rank: int
    world: int
    local_world: int  # ranks on this node
    device: torch.device
    group: dist.ProcessGroup  # tensors on `device`
    control: dist.ProcessGroup  # small tensors and objects on the CPU, beside the model's traffic

    def sharding_env(self) -> ShardingEnv:
        """State dicts hold DTensors, which torch.distributed.checkpoint reshards to any world size."""
        return ShardingEnv(self.world, self.rank, self.group, output_dtensor=True)

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers, on all of them."""
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return int(largest)

    def together(self, build: Callable[[], Result]) -> Result:
        """build() on every rank; an InputError on one rank is raised on all of them."""
        error = result = None
        try:
            result = build()
        except InputError as caught:
            error = caught
        messages: list[str | None] = [None] * self.world
        dist.all_gather_object(messages, str(error) if error else None, group=self.control)
        if any(messages):
            raise error or InputError(next(message for message in messages if message))
        return result


@contextmanager
def joined_ranks(training: TrainingConfig) -> Iterator[Ranks]:
    """Join the process group that torchrun's environment names (or one of a single process); leave it at the end.

    A collective that fails in here because of another rank, whichever collective it is, is raised as PeerLost.
    A rank that has a GPU computes with one thread on its host.
    """
    device = choose_device(training)
    environment = {name: int(os.environ.get(name, default)) for name, default in _ALONE.items()}
    rank, world = environment["RANK"], environment["WORLD_SIZE"]
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_num_threads(1)  # the host only dispatches: with 16 threads a step took a fifth longer
        # so that a collective that is given up raises here, instead of a minute later ending the process by an abort
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
        os.environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "1000")  # it sleeps four times as long first
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=None if "WORLD_SIZE" in os.environ else dist.HashStore(),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=training.timeout_seconds),
    )
    group = dist.group.WORLD
    record = flight_record.of(group)
    try:
        with last_words(record) if world > 1 else nullcontext():
            control = dist.new_group(backend="gloo", timeout=timedelta(seconds=training.timeout_seconds))
            # TorchRec's asynchronous row-wise backward needs an uneven all-gather, which gloo has not.
            set_use_sync_collectives(device.type == "cpu")
            try:
                yield Ranks(rank, world, environment["LOCAL_WORLD_SIZE"], device, group, control)
            except InputError:  # raised on every rank
                with suppress(RuntimeError):  # of a peer that has gone meanwhile
                    _leave(control)
                raise
            _leave(control)
    except Exception as error:
        raise record.lost(error) from error


def _leave(control: dist.ProcessGroup) -> None:
    # in this order: a model that outlives its group aborts the process at exit
    dist.barrier(group=control)
    gc.collect()
    dist.destroy_process_group()


def choose_device(training: TrainingConfig) -> torch.device:
    """The device of this rank; InputError for what the machine cannot do."""
    cuda = torch.cuda.is_available()
    if training.device == "cuda" and not cuda:
        raise InputError(
            "training.device=cuda or --device cuda: torch sees no GPU here (`msn doctor` says why); use cpu or auto"
        )
    if training.device == "cpu" or not cuda:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


_ALONE = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
