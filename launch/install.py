"""Set up .venv in this checkout: `make` runs this once, and again when the requirements change.

Needs Python 3.11 or newer with venv, and nothing else. Packages come from wherever pip is
configured to look. Prints a few lines and exits with 1 and the reason if a step fails.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import time
from pathlib import Path

from versions import NEWEST, Triple, pip_steps, triple_for

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 (whatever python3 is here runs this)
        stop(
            f"msn_dist needs Python 3.11 or newer, and {sys.executable} is {sys.version.split()[0]}.\n"
            "Name a newer one: make PYTHON=python3.12 ..."
        )
    start = time.monotonic()
    cuda = has_nvidia_driver()
    triple, inherited = (NEWEST, False) if not cuda else cuda_triple()
    say(f"Setting up {VENV} with Python {sys.version.split()[0]} (once; takes a few minutes)")
    say("NVIDIA driver found: CUDA builds" if cuda else "No NVIDIA driver: CPU builds")
    create_venv(inherited)
    torch, *others = pip_steps(triple, cuda)
    for step in others if inherited else [torch, *others]:
        pip_install(*step)
    pip_install("--editable", f"{ROOT}[dev]", title="msn_dist and its tools")
    say(f"Ready after {time.monotonic() - start:.0f} s. `.venv/bin/msn doctor` tells what this machine can run.")


def has_nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def cuda_triple() -> tuple[Triple, bool]:
    """The triple for a CUDA machine, and whether its torch is the one that this Python already has."""
    try:
        found = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return NEWEST, False
    triple = triple_for(found)
    # A virtual environment made from another one would not see its packages.
    if triple is None or "+cpu" in found or sys.prefix != sys.base_prefix:
        return NEWEST, False
    say(f"Using torch {found}, which {sys.executable} already has")
    return triple, True


def create_venv(inherited: bool) -> None:
    # --clear: what an interrupted installation left behind is not to be trusted.
    options = ["--clear", *(["--system-site-packages"] if inherited else [])]
    if subprocess.run([sys.executable, "-m", "venv", *options, str(VENV)]).returncode:
        stop("Python could not create a virtual environment (on Debian and Ubuntu: apt install python3-venv).")


def pip_install(*arguments: str, title: str = "") -> None:
    say(f"  {title or ' '.join(arguments)}")
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    if subprocess.run([*pip, *arguments]).returncode:
        stop(
            "pip failed, for the reason above. It needs the network, or PIP_INDEX_URL set to a mirror;\n"
            "then run the same make command again."
        )


def say(line: str) -> None:
    print(line, flush=True)


def stop(reason: str) -> None:
    sys.exit(f"set-up failed: {reason}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("set-up interrupted; the next make starts it again")
