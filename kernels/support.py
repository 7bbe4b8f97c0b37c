"""Whether the Triton kernels can run on a device."""

from __future__ import annotations

import importlib.util
import os

import torch


def why_no_triton(device: torch.device | str) -> str | None:
    """None if the kernels run on tensors of `device`, else the reason, as a clause.

    On a CPU they run in Triton's interpreter alone, which is for tests: TRITON_INTERPRET=1.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    device = torch.device(device)
    if interpreted():
        return None if device.type in ("cpu", "cuda") else f"there are no kernels for {device.type}"
    if device.type != "cuda":
        return f"the kernels need a CUDA GPU, and the device is {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"the kernels need compute capability 8.0, and this GPU has {major}.{minor}"


def interpreted() -> bool:
    """Kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
