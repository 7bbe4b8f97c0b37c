"""A second stream for what must not wait for work that was enqueued meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Aside:
    """On a GPU, work that starts where a mark was set, beside what has been enqueued since. On a CPU it just runs."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def mark(self) -> torch.cuda.Event | None:
        """This point of the current stream."""
        return None if self._stream is None else torch.cuda.current_stream().record_event()

    @contextmanager
    def after(self, mark: torch.cuda.Event | None) -> Iterator[None]:
        """Run this beside; what the current stream is given later comes after it."""
        if mark is None:
            yield
            return
        self._stream.wait_event(mark)
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)
