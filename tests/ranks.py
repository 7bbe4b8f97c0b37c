"""Run a test function on several gloo ranks of this machine."""

from __future__ import annotations

import gc
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120, backend: str = "gloo"
) -> list[Any]:
    """Call ``function(rank, world_size, *args)`` on `world_size` processes; return what each rank returned.

    `function` must be at the top level of a module. In every process a default group of `backend` is
    up and torch has one thread; UserWarnings are errors. With nccl a rank has a GPU of its own, or where
    these are too few all share the first, each as a node of its own. The first failure is raised here
    with its traceback, as AssertionError; so is a rank that is not done after `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = mp.start_processes(
            _rank,
            (function, world_size, args, folder, timeout, backend),
            nprocs=world_size,
            join=False,
            start_method="spawn" if torch.cuda.is_available() else "forkserver",  # CUDA does not survive a fork
        )
        deadline = time.monotonic() + timeout
        try:
            while not processes.join(timeout=1):
                if time.monotonic() > deadline:
                    raise AssertionError(f"{function.__name__} on {world_size} ranks is not done after {timeout} s")
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            # The rank that failed first, not one that only lost its peer.
            failures = sorted(folder.glob("*.error"), key=lambda file: file.stat().st_mtime_ns)
            raise AssertionError(failures[0].read_text() if failures else str(error)) from None
        finally:
            for process in processes.processes:
                process.kill()
        return [torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(world_size)]


def _rank(
    rank: int,
    function: Callable[..., Any],
    world_size: int,
    args: tuple,
    folder: Path,
    timeout: float,
    backend: str,
) -> None:
    shared = backend == "nccl" and torch.cuda.device_count() < world_size
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(0 if shared else rank),
        "LOCAL_WORLD_SIZE": str(1 if shared else world_size),
    }
    if backend == "nccl" and not shared:
        torch.cuda.set_device(rank)
    torch.set_num_threads(1)
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            # torchrec 1.6 on torch 2.11, whenever it makes a ShardingEnv
            warnings.filterwarnings("ignore", "`_get_pg_default_device` will be deprecated", UserWarning)
            warnings.filterwarnings("ignore", "Multiple backends are registered", UserWarning)
            warnings.filterwarnings("ignore", "TBE B200 optimization", UserWarning)  # fbgemm, which tells of a feature
            torch.save(function(rank, world_size, *args), folder / f"{rank}.result")
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank} of {world_size} failed\n{traceback.format_exc()}")
        raise
    # In this order: a model that outlives its group aborts the process at exit.
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()
