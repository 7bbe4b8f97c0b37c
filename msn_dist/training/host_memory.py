"""Whether the host has room for values that are to lie in its memory: on a CPU, or by memory.tier: host.

Without this look the system would end a process without a word, after minutes of filling the table.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from msn_dist.errors import InputError
from msn_dist.units import binary


def require_cpu_memory(values: int, free: int | None) -> None:
    """InputError unless `free` bytes are enough for `values` bytes, those of all ranks of a node that has no GPUs."""
    if free is not None and values > free:
        raise InputError(
            f"memory: the values of this node's ranks take {binary(values)}, and {binary(free)} of its memory is free; "
            "use more nodes, fewer memory.sub_keys, or a smaller memory.value_dim or memory.value_dtype"
        )


def require_host_memory(values: int, free: int | None) -> None:
    """InputError unless `free` bytes are enough for `values` bytes, those of all ranks of a node, and their copy."""
    if free is not None and 2 * values > free:
        raise InputError(
            f"memory.tier=host: the values of this node's ranks take {binary(values)} of its memory, and as much again "
            f"while a checkpoint is saved, but {binary(free)} is free; use more nodes, fewer memory.sub_keys, or "
            "memory.tier=device"
        )


def free_host_bytes(root: Path = Path("/")) -> int | None:
    """What the system can still give, or the container's limit (cgroup v2) lets it; None if neither says."""
    free = []
    with suppress(OSError, KeyError, ValueError):
        free.append(1024 * _numbers(root / "proc/meminfo")["MemAvailable:"])
    with suppress(OSError, KeyError, ValueError):  # a limit of "max" is none
        group = root / "sys/fs/cgroup"
        used = _numbers(group / "memory.stat")
        free.append(int((group / "memory.max").read_text()) - used["anon"] - used["shmem"])
    return min(free, default=None)


def lies_in_memory(path: Path, root: Path = Path("/")) -> bool:
    """Whether files at this absolute path are kept by a file system in the host's memory, as those of /dev/shm are."""
    mounts = []
    with suppress(OSError):
        mounts = [line.split()[1:3] for line in (root / "proc/mounts").read_text().splitlines()]
    around = [(len(Path(place).parts), kind) for place, kind in mounts if path.is_relative_to(place)]
    return bool(around) and max(around)[1] in ("tmpfs", "ramfs")


def _numbers(path: Path) -> dict[str, int]:
    """{first word: second word} of every line."""
    return {words[0]: int(words[1]) for line in path.read_text().splitlines() if len(words := line.split()) > 1}
