"""Batches on a rank's device, copied while the step before computes."""

from __future__ import annotations

from collections.abc import Generator

import torch

from msn_dist.data.batch import Batch

Steps = Generator[tuple[Batch, int], None, None]  # as handshake.in_step yields them


def on_device(steps: Steps, device: torch.device) -> Steps:
    """The same steps with their batches on `device`.

    To a GPU one batch is copied ahead, from pinned memory and on a stream of its own: a copy from other memory would
    wait for the step that computes, and the host, which is to be ahead of the GPU, with it.
    """
    try:
        if device.type != "cuda":
            for batch, rows in steps:
                yield batch.to(device), rows
            return
        stream, ahead = torch.cuda.Stream(device), None
        for batch, rows in steps:
            with torch.cuda.stream(stream):
                copied = _told_its_lengths(batch).pin_memory().to(device, non_blocking=True)
                coming = copied, rows, stream.record_event()
            if ahead is not None:
                yield _arrived(*ahead)
            ahead = coming
        if ahead is not None:
            yield _arrived(*ahead)
    finally:
        steps.close()


def _told_its_lengths(batch: Batch) -> Batch:
    """TorchRec asks how many values a key has: here the host need not wait for the answer."""
    if len(batch):
        batch.sparse.sync()
    return batch


def _arrived(batch: Batch, rows: int, copied: torch.cuda.Event) -> tuple[Batch, int]:
    stream = torch.cuda.current_stream(batch.groups_B.device)
    stream.wait_event(copied)
    batch.record_stream(stream)
    return batch, rows
