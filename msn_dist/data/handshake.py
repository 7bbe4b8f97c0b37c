"""Keeps ranks in step when they have different numbers of batches: they start, stop and fail together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist

from msn_dist.data.batch import Batch
from msn_dist.data.schema import Schema
from msn_dist.errors import InputError


def in_step(
    batches: Iterable[Batch], schema: Schema, group: dist.ProcessGroup | None = None
) -> Iterator[tuple[Batch, int]]:
    """Yield (batch, rows of this step over all ranks) until every rank is out of batches.

    A rank that runs out early gets empty batches, so that every rank takes part in every collective
    of the model. One batch is read ahead: the all-reduce about step t + 1 is in flight while step t
    computes.

    A consumer may stop early if all ranks stop after the same step; the all-reduce in flight, which
    every rank has issued by then, is waited for when the generator is closed.

    Args:
        batches: this rank's batches, at most one at a time in use.
        group: a process group on the CPU (gloo); None: the default group. Without
            torch.distributed the batches are passed through.

    Raises:
        InputError: on every rank, with the message of the rank whose reading raised it.
        RuntimeError: on the other ranks, when reading raised anything else on one rank.
    """
    if not (dist.is_available() and dist.is_initialized()):
        for batch in batches:
            yield batch, len(batch)
        return
    iterator = iter(batches)
    turn = _Turn(iterator, group)
    try:
        while True:
            total_rows, ranks_with_batch, ranks_with_error = turn.outcome()
            if ranks_with_error:
                _raise_together(turn.error, group)
            if not ranks_with_batch:
                return
            batch = turn.batch if turn.batch is not None else Batch.empty(schema)
            turn = _Turn(iterator, group)
            yield batch, total_rows
    finally:
        turn.outcome()


class _Turn:
    """The next batch of this rank, or the error that reading it raised, announced to the other ranks."""

    def __init__(self, iterator: Iterator[Batch], group: dist.ProcessGroup | None) -> None:
        self.batch: Batch | None = None
        self.error: Exception | None = None
        try:
            self.batch = next(iterator, None)
        except Exception as error:  # whatever it is, the other ranks must hear of it
            self.error = error
        rows = 0 if self.batch is None else len(self.batch)
        self._sums = torch.tensor([rows, self.batch is not None, self.error is not None], dtype=torch.int64)
        self._work = dist.all_reduce(self._sums, group=group, async_op=True)

    def outcome(self) -> list[int]:
        """[rows, ranks with a batch, ranks with an error]; waits for all ranks to announce theirs."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._sums.tolist()


def _raise_together(error: Exception | None, group: dist.ProcessGroup | None) -> None:
    own = None if error is None else (isinstance(error, InputError), f"{type(error).__name__}: {error}", str(error))
    reports = [None] * dist.get_world_size(group)
    dist.all_gather_object(reports, own, group=group)
    if error is not None:
        raise error
    rank, (is_input, described, message) = next((r, report) for r, report in enumerate(reports) if report)
    if is_input:
        raise InputError(message)
    raise RuntimeError(f"rank {rank} failed while reading data: {described}")
