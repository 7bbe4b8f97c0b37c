"""A program for test_launch: started plainly it launches itself on two ranks, which then end as told."""

from __future__ import annotations

import os
import signal
import sys

import torch.distributed as dist

from msn_dist.errors import InputError
from msn_dist.launch.cli import app, main
from msn_dist.launch.processes import is_worker, launch


@app.command()
def end(how: str) -> None:
    print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}, OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}")
    dist.init_process_group("gloo")
    dist.barrier()
    if os.environ["RANK"] == "1":
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise InputError("column 'age' is missing") if how == "bad_input" else KeyError("boom")
    dist.barrier()  # the peer has gone: this raises


if __name__ == "__main__":
    if is_worker():
        main(["end", sys.argv[1]])
    sys.exit(launch([__file__, sys.argv[1]], nproc=2))
