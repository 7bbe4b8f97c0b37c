"""Which versions of torch, FBGEMM and TorchRec belong together, and how pip installs them.

Standard library only: the installer runs this before anything is installed.
"""

from __future__ import annotations

from typing import NamedTuple


class Triple(NamedTuple):
    """Releases built against each other; FBGEMM's operators load only beside their own torch."""

    torch: str
    fbgemm: str
    torchrec: str


TRIPLES = {
    "2.11": Triple("2.11.0", "1.6.0", "1.6.1"),
    "2.12": Triple("2.12.0", "1.7.0", "1.7.0"),
    "2.13": Triple("2.13.0", "1.8.0", "1.8.0"),
}
NEWEST = TRIPLES["2.13"]

# What torchrec requires beside fbgemm-gpu; on a CPU machine pip cannot be left to find it.
TORCHREC_REQUIRES = ["tensordict", "torchmetrics==1.0.3", "tqdm", "pyre-extensions", "iopath"]


def minor(version: str) -> str:
    """'2.13.0+cpu' -> '2.13'."""
    return ".".join(version.split(".")[:2])


def triple_for(torch_version: str | None) -> Triple | None:
    """The triple of an installed torch; the newest one if there is no torch, None if that torch is not supported."""
    return NEWEST if torch_version is None else TRIPLES.get(minor(torch_version))


def pip_steps(triple: Triple, cuda: bool) -> list[list[str]]:
    """Arguments of `pip install`, one list per step, in the order that works.

    torch comes first and by its exact version. torchrec's metadata asks for the CUDA build of
    FBGEMM, so on a CPU machine it is installed without its dependencies.
    """
    torch = [f"torch=={triple.torch}"]
    if cuda:
        return [torch, [f"fbgemm-gpu=={triple.fbgemm}", f"torchrec=={triple.torchrec}", "iopath"]]
    return [
        torch,
        [f"fbgemm-gpu-cpu=={triple.fbgemm}", *TORCHREC_REQUIRES],
        ["--no-deps", f"torchrec=={triple.torchrec}"],
    ]
