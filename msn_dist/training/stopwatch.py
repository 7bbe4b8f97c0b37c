"""Time spent training, with the device's work included and pauses left out."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Runs between `start` and `stop`; `seconds` may be read at any time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0.0
        self._since: float | None = None

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        self._before, self._since = self.seconds(), None

    def seconds(self) -> float:
        """Seconds so far; waits for what the device still has to do."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._before + (0.0 if self._since is None else time.perf_counter() - self._since)
