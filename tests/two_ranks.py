"""The command as a user starts it, and on two ranks of this machine in the environment that torchrun gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp

from msn_dist.launch.cli import main

ROOT = Path(__file__).parent.parent


def msn_launched(folder: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """`msn` in a process of its own, in `folder`."""
    return subprocess.run(
        [sys.executable, "-m", "msn_dist.launch", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def msn_on_two_ranks(folder: Path, arguments: list[str]) -> tuple[list[int | None], str]:
    """(exit code of each rank, what both printed) of `msn`; `folder` is for its output and errors."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environments = [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TRITON_INTERPRET": "0",  # as a user's environment
            "TORCHELASTIC_ERROR_FILE": str(folder / "errors" / str(rank) / "error.json"),
        }
        for rank in range(2)
    ]
    (folder / "errors").mkdir()
    context = mp.get_context("forkserver")
    ranks = [context.Process(target=_rank, args=(arguments, folder, environment)) for environment in environments]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(180)  # only a hang takes so long
        rank.kill()
    return [rank.exitcode for rank in ranks], (folder / "output").read_text()


def _rank(arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
    os.environ |= environment
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    main(arguments)
