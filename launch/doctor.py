"""`msn doctor`: what is installed, whether it fits together, what this machine can run, how to repair it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from msn_dist.launch.versions import NEWEST, TRIPLES, minor, pip_steps, triple_for

FBGEMM_PACKAGES = ("fbgemm-gpu", "fbgemm-gpu-cpu")
NCCL_SHARES_GPU = (2, 30)


@dataclass
class Facts:
    """What was seen on this machine; None, or nothing, where it is absent."""

    python: str
    torch: str | None
    torchrec: str | None
    fbgemm: dict[str, str]  # package -> version
    triton: str | None
    cores: int
    driver: str | None
    errors: dict[str, str] = field(default_factory=dict)  # torch, fbgemm or torchrec -> why it does not load
    cuda: str | None = None  # CUDA version that torch is built for
    gloo: bool = False
    nccl: tuple[int, ...] | None = None
    gpus: list[str] = field(default_factory=list)


@dataclass
class Finding:
    """A line of the table: `problem` says what is wrong, `repair` is the command that mends it."""

    name: str
    value: str
    problem: str | None = None
    repair: str | None = None


def examine() -> int:
    """Print the table for this machine; 0 if all is well, 1 if not."""
    findings = diagnose(look())
    table = Table("", "here", "state")
    for finding in findings:
        state = Text(finding.problem, "red") if finding.problem else Text("ok", "green")
        table.add_row(finding.name, finding.value, state)
    console = Console()
    console.print(table)
    repairs = list(dict.fromkeys(finding.repair for finding in findings if finding.repair))
    if repairs:
        console.print("To repair:", *repairs, sep="\n", soft_wrap=True, highlight=False, markup=False)
    return int(any(finding.problem for finding in findings))


def look() -> Facts:
    """Read versions from the packages' metadata, and load the libraries in a process of their own."""
    facts = Facts(
        python=".".join(map(str, sys.version_info[:3])),
        torch=_version("torch"),
        torchrec=_version("torchrec"),
        fbgemm={package: version for package in FBGEMM_PACKAGES if (version := _version(package))},
        triton=_version("triton"),
        cores=len(os.sched_getaffinity(0)),
        driver=_driver(),
    )
    script = Path(__file__).with_name("probe.py")
    probe = subprocess.run([sys.executable, "-P", str(script)], capture_output=True, text=True)
    loaded = {}
    for line in probe.stdout.splitlines():
        if line.startswith("{"):
            loaded |= json.loads(line)
    for library in ("torch", "fbgemm", "torchrec"):
        # A library that crashed the process has no line, nor have those after it.
        outcome = loaded.get(library, {"error": f"loading it ended with exit status {probe.returncode}"})
        if "error" in outcome:
            facts.errors[library] = outcome["error"]
    torch = loaded.get("torch", {})
    facts.cuda, facts.gloo, facts.gpus = torch.get("cuda"), torch.get("gloo", False), torch.get("gpus", [])
    facts.nccl = tuple(torch["nccl"]) if torch.get("nccl") else None
    return facts


def diagnose(facts: Facts) -> list[Finding]:
    """The lines of the table, in order. Knows nothing but `facts`."""
    return [
        Finding("Python", facts.python),
        _torch(facts),
        _fbgemm(facts),
        _torchrec(facts),
        Finding("triton", facts.triton or "not installed (optional: GPU kernels)"),
        Finding("NVIDIA driver", facts.driver or "none"),
        Finding("gloo", "CPU ranks can talk" if facts.gloo else "missing", None if facts.gloo else _no_gloo(facts)),
        Finding("NCCL", _nccl(facts)),
        Finding("this machine runs", _capacity(facts)),
    ]


def _torch(facts: Facts) -> Finding:
    problem = None
    if facts.torch is None:
        problem = "is needed"
    elif triple_for(facts.torch) is None:
        problem = f"not supported; {', '.join(TRIPLES)} are"
    elif "torch" in facts.errors:
        problem = facts.errors["torch"]
    elif facts.driver and not facts.cuda:
        problem = "a CPU build, beside an NVIDIA driver"
    elif facts.driver and not facts.gpus:
        problem = f"built for CUDA {facts.cuda}, sees no GPU: is the driver too old, or CUDA_VISIBLE_DEVICES empty?"
    return Finding("torch", facts.torch or "not installed", problem, problem and _reinstall(facts, torch_too=True))


def _fbgemm(facts: Facts) -> Finding:
    wanted, package = _triple(facts).fbgemm, FBGEMM_PACKAGES[0 if facts.driver else 1]
    value = ", ".join(f"{name} {version}" for name, version in facts.fbgemm.items()) or "not installed"
    problem = None
    if not facts.fbgemm:
        problem = "is needed"
    elif len(facts.fbgemm) > 1:
        problem = "two builds overwrite each other's files"
    elif package not in facts.fbgemm and facts.driver:
        problem = "a CPU build, beside an NVIDIA driver"
    elif any(minor(version) != minor(wanted) for version in facts.fbgemm.values()):
        problem = f"torch {_triple(facts).torch} needs {wanted}"
    if "fbgemm" in facts.errors and facts.fbgemm:
        problem = "; ".join(filter(None, [problem, facts.errors["fbgemm"]]))
    return Finding("fbgemm", value, problem, problem and _reinstall(facts))


def _torchrec(facts: Facts) -> Finding:
    wanted = _triple(facts).torchrec
    problem = None
    if facts.torchrec is None:
        problem = "is needed"
    elif minor(facts.torchrec) != minor(wanted):
        problem = f"torch {_triple(facts).torch} needs {wanted}"
    elif "torchrec" in facts.errors:
        problem = facts.errors["torchrec"]
    return Finding("torchrec", facts.torchrec or "not installed", problem, problem and _reinstall(facts))


def _no_gloo(facts: Facts) -> str:
    return "torch does not load" if "torch" in facts.errors else "this torch was built without it"


def _nccl(facts: Facts) -> str:
    if facts.nccl is None:
        return "none (needed on GPUs only)"
    version = ".".join(map(str, facts.nccl))
    if facts.nccl >= NCCL_SHARES_GPU:
        return f"{version}; several ranks on one GPU with NCCL_MULTI_RANK_GPU_ENABLE=1"
    return f"{version}; one rank on a GPU (sharing one needs NCCL 2.30)"


def _capacity(facts: Facts) -> str:
    ranks = f"CPU ranks on {facts.cores} core{'s' * (facts.cores > 1)}"
    if not facts.gpus:
        return ranks
    names = ", ".join(f"{facts.gpus.count(name)} x {name}" for name in dict.fromkeys(facts.gpus))
    return f"{len(facts.gpus)} GPU rank{'s' * (len(facts.gpus) > 1)} ({names}), {ranks}"


def _triple(facts: Facts):
    return triple_for(facts.torch) or NEWEST


def _reinstall(facts: Facts, torch_too: bool = False) -> str:
    """The command that installs what belongs beside this torch, or everything."""
    torch, *others = pip_steps(_triple(facts), cuda=facts.driver is not None)
    # The two builds of fbgemm share files: the one that is there has to go first.
    remove = [["uninstall", "--yes", *facts.fbgemm]] if facts.fbgemm else []
    install = [["install", *step] for step in ([torch, *others] if torch_too else others)]
    return " && ".join(shlex.join([sys.executable, "-m", "pip", *step]) for step in remove + install)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """Version of the NVIDIA driver."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer[0] if answer else None
