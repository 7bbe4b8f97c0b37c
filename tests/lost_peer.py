"""A program for test_flight_record: three ranks that exchange until one of them ends, the others in exchange 5.

python tests/lost_peer.py HOW VICTIM    launches itself; as a rank, it is that rank
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from msn_dist.config import TrainingConfig
from msn_dist.launch.cli import app, main
from msn_dist.launch.processes import is_worker, launch
from msn_dist.sharding import flight_record
from msn_dist.training.ranks import joined_ranks

WORLD = 3


@app.command()
def lose(how: str, victim: int) -> None:
    with joined_ranks(TrainingConfig(device="cpu", timeout_seconds=60)) as ranks:
        pids: list[int] = [0] * ranks.world
        dist.all_gather_object(pids, os.getpid())
        # ranks meet as slowly as the machine is loaded, and only then a short timeout may begin
        group = ranks.group if how == "told" else dist.new_group(timeout=timedelta(seconds=3))
        record = flight_record.of(group)
        for sequence in range(1, 6):
            sent_HD = torch.ones(ranks.world * sequence, 8)
            bytes_W = [sent_HD.nbytes // ranks.world] * ranks.world
            number = record.departed(f"forward hits of layer{sequence % 2}", bytes_W, bytes_W)
            if sequence == 5 and ranks.rank == victim:
                end(how, pids)
            try:
                work = dist.all_to_all_single(torch.empty_like(sent_HD), sent_HD, group=group, async_op=True)
                work.wait()
            except RuntimeError as error:
                raise record.lost(error) from error
            record.arrived(number)


def end(how: str, pids: list[int]) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "told":
        for pid in set(pids) - {os.getpid()}:
            os.kill(pid, signal.SIGTERM)
    if how in ("stopped", "told"):
        os.kill(os.getpid(), signal.SIGSTOP)
    raise KeyError("boom")


if __name__ == "__main__":
    if is_worker():
        main(["lose", *sys.argv[1:]])
    sys.exit(launch([__file__, *sys.argv[1:]], nproc=WORLD))
