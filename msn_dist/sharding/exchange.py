"""The one collective of the memory exchange: an all-to-all that is asynchronous, counted and on record.

Every strategy is made of it.  It works on gloo and NCCL, with any number of rows from any rank to any other,
none included; all ranks must start their messages in the same order.

Shape suffixes: W ranks of the group.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from msn_dist.sharding import flight_record
from msn_dist.sharding.overlap import Overlap
from msn_dist.sharding.traffic import Traffic


class Exchange:
    """The messages of one memory over one process group."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.memory = "a memory"  # for people; the sharder gives the name of its module
        self.rank, self.world = group.rank(), group.size()
        self.traffic = Traffic(self.world)
        self.overlap = Overlap(device)
        self._record = flight_record.of(group)

    def start(
        self, direction: str, name: str, sent: Tensor, send_splits: list[int], receive_splits: list[int]
    ) -> Flight:
        """Send consecutive slices of `sent` along dimension 0, as many rows to each rank as `send_splits` says."""
        if self.world == 1:
            return Flight(sent)
        row_bytes = sent.shape[1:].numel() * sent.element_size()
        send_bytes_W = [row_bytes * rows for rows in send_splits]
        send_bytes_W[self.rank] = 0
        self.traffic.add(direction, name, send_bytes_W)
        sequence = self._record.departed(
            f"{direction} {name} of {self.memory}", send_bytes_W, [row_bytes * rows for rows in receive_splits]
        )
        received = sent.new_empty(sum(receive_splits), *sent.shape[1:])
        with torch.profiler.record_function(f"## exchange {direction} {name} ##"):
            try:
                work = dist.all_to_all_single(
                    received, sent.contiguous(), receive_splits, send_splits, group=self.group, async_op=True
                )
            except RuntimeError as error:
                raise self._record.lost(error) from error
        return _Underway(received, sent, self, work, sequence)

    def swap_counts(self, counts_WC: Tensor) -> Flight:
        """Row w of counts_WC goes to rank w; row w of what arrives has come from there."""
        each = [1] * self.world
        return self.start("forward", "counts", counts_WC, each, each)


class Flight:
    """A message whose receiver is this rank itself: already there."""

    def __init__(self, received: Tensor) -> None:
        self._received = received

    def wait(self) -> Tensor:
        """What all ranks have sent here, rank after rank along dimension 0."""
        return self._received


class _Underway(Flight):
    def __init__(self, received: Tensor, sent: Tensor, exchange: Exchange, work: dist.Work, sequence: int) -> None:
        super().__init__(received)
        self._sent = sent  # must live until it has gone
        self._span = exchange.overlap.departed(work)
        self._record, self._sequence = exchange._record, sequence

    def wait(self) -> Tensor:
        if self._sent is not None:
            try:
                self._span.wait()
            except RuntimeError as error:
                raise self._record.lost(error) from error
            self._record.arrived(self._sequence, self._span.completed)
            self._sent = None
            if self._received.is_cuda:  # it may have been allocated on another stream
                self._received.record_stream(torch.cuda.current_stream())
        return self._received
