"""One command, several processes: start them on this machine, and end them with one message and one exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from msn_dist.errors import InputError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

PEER_LOST = 4  # exit code
_AGENT_KILLS_AFTER = 25  # seconds after SIGTERM, or nearly 30


def is_worker() -> bool:
    """Whether torchrun, `launch` below or a scheduler started this process as one of several."""
    return "WORLD_SIZE" in os.environ


def choose_nproc(requested: int | None, device: str) -> int:
    """Processes to start for ``training.device``: what was asked for, else one per GPU, or one on a CPU.

    InputError if that is less than 1 or more than there are GPUs.
    """
    if requested is not None and requested < 1:
        raise InputError(f"--nproc {requested}: at least 1 process is needed")
    gpus = 0 if device == "cpu" else _gpu_count()
    if device == "cuda" and not gpus:
        raise InputError(
            "training.device=cuda or --device cuda: torch sees no GPU here (`msn doctor` says why); use cpu or auto"
        )
    if requested is not None and gpus and requested > gpus:
        raise InputError(
            f"--nproc {requested}: this machine has {gpus} GPU{'s' * (gpus > 1)}, and each process needs its own; "
            "lower --nproc, or add training.device=cpu (--device cpu of msn calibrate)"
        )
    return requested or gpus or 1


def launch(command: list[str], nproc: int) -> int:
    """Run ``python *command`` in `nproc` processes, as torchrun would; return their common exit code.

    Their output goes straight through. The first failure ends all of them. A signal to this process
    ends them too and comes back as KeyboardInterrupt (SIGINT) or exit code 128 + signal.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    # This process only waits, and the workers explain themselves: torch's own account is left out.
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="msn_") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-u", *command)
        except ChildFailedError as error:
            return common_exit_code(error.failures)
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            return 128 + error.sigval
        finally:
            logging.disable(logging.NOTSET)
    return 0


def common_exit_code(failures: dict[int, ProcessFailure]) -> int:
    """Explain the processes that a signal ended, as they could not; return 2 before 1, and 1 before PEER_LOST."""
    first = min(failure.timestamp for failure in failures.values())
    causes = set()
    for rank, failure in failures.items():
        code = failure.exitcode
        if code in (-signal.SIGTERM, 128 + signal.SIGTERM):
            continue  # how the others are ended
        if code == -signal.SIGKILL and failure.timestamp - first >= _AGENT_KILLS_AFTER:
            print(f"rank {rank} did not end when it was told to, and was killed", file=sys.stderr)
            continue
        if code < 0:
            name = signal.Signals(-code).name
            hint = "; is the machine out of memory?" if name == "SIGKILL" else ""
            print(f"rank {rank} was ended by {name}{hint}", file=sys.stderr)
        causes.add(code)
    return 2 if 2 in causes else PEER_LOST if causes == {PEER_LOST} else 1


def claim_failure(exit_code: int) -> int | None:
    """Let the first rank of this node that fails by itself speak for all of them; those who lost a peer may all speak.

    Returns None if this process may speak, else the exit code of the rank that was first: a rank that
    fails after it most likely only lost its peer.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # .../attempt/local_rank/error.json
    if error_file is None:
        return None
    claim = Path(error_file).parents[1] / "first_failure"
    if exit_code == PEER_LOST:
        return int(claim.read_text()) if claim.exists() else None
    mine = claim.with_name(f"failure_{os.getpid()}")
    mine.write_text(str(exit_code))
    try:
        os.link(mine, claim)  # atomic, and complete as soon as it exists
    except FileExistsError:
        return int(claim.read_text())
    return None


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
