"""Memory health: how evenly the slots are used, counted as the memory trains.

Each rank counts the hits on the rows it holds; `read` combines the ranks with two small
reductions.  The counts are binned to 6 bits after the leading one, so what is reduced does not grow
with the table, and every share below is within 1.6 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_BINS = 32 << 6  # counts below 2^31: 6 mantissa bits in each of 32 octaves
_MANTISSA = 23 - 6
# rows looked at together: no temporary of the table's size
_CHUNK = {"cpu": 2**22, "cuda": 2**25}


@dataclass(frozen=True)
class MemoryHealth:
    """One look at a table's use.  "Window" is the time since the look before."""

    slots: int
    used_share: float  # slots hit at least once since the start
    window_used_share: float  # slots hit in the window
    dead_slots: int  # slots never hit
    entropy_ratio: float  # entropy of the window's hits / log n; 1 is uniform use, NaN a window without hits
    kl_to_uniform: float  # nats
    top1pct_share: float  # share of the window's hits that the most used 1 % of slots take
    owner_load_max_over_mean: float  # hits on the busiest rank / mean over ranks
    hits: int
    hits_per_owner: list[int]
    histogram: list[tuple[float, int]]  # (hits in the window, slots with so many), ascending

    def summary(self) -> dict[str, float]:
        """The scalars that are logged at every interval."""
        skip = {"hits", "hits_per_owner", "histogram"}
        return {name: value for name, value in vars(self).items() if name not in skip}


class SlotUsage:
    """Hit counters of the rows one rank holds; 5 bytes a row, no part of a checkpoint.

    Not buffers of the module: DistributedDataParallel would broadcast them from rank 0.
    """

    def __init__(self, rows: int, device: torch.device | str) -> None:
        self.window_R = torch.zeros(rows, dtype=torch.int32, device=device)
        self.ever_R = torch.zeros(rows, dtype=torch.bool, device=device)
        self._one = torch.ones((), dtype=torch.int32, device=device)

    def rows(self, block: slice) -> SlotUsage:
        """The counters of some of the rows, in the same memory."""
        part = SlotUsage.__new__(SlotUsage)
        part.window_R, part.ever_R, part._one = self.window_R[block], self.ever_R[block], self._one
        return part

    @torch.no_grad()
    def count(self, rows_H: Tensor) -> None:
        """Count one hit on each of these local rows (repeats count again)."""
        if self.window_R.device != rows_H.device:  # the module was moved
            for name in ("window_R", "ever_R", "_one"):
                setattr(self, name, getattr(self, name).to(rows_H.device))
        self.window_R.index_add_(0, rows_H, self._one.expand(rows_H.shape))

    @torch.no_grad()
    def read(self, slots: int, group: dist.ProcessGroup | None = None) -> MemoryHealth:
        """Health over all ranks of `group` (a collective call), and the start of a new window."""
        rank, world = (group.rank(), group.size()) if group is not None else (0, 1)
        device = self.window_R.device
        slots_per_bin = torch.zeros(_BINS, dtype=torch.float64, device=device)
        hits_per_bin, owners = torch.zeros_like(slots_per_bin), slots_per_bin.new_zeros(world)
        hits_log_hits, ever = slots_per_bin.new_zeros(()), slots_per_bin.new_zeros(())
        chunk = _CHUNK[device.type]
        for window_C, ever_C in zip(self.window_R.split(chunk), self.ever_R.split(chunk), strict=True):
            hit_C = window_C != 0
            ever_C |= hit_C
            ever += ever_C.sum()
            window_X = window_C[hit_C]  # of a large table most rows have no hit
            # a count that has passed 2^31 is negative
            hits_X = torch.where(window_X < 0, 2.0**31 - 128, window_X.to(torch.float32))
            bins_X = ((hits_X.view(torch.int32) >> _MANTISSA) - ((127 << 6) - 1)).to(torch.int64)
            slots_per_bin += torch.bincount(bins_X, minlength=_BINS)
            slots_per_bin[0] += len(window_C) - len(window_X)
            hits_X = hits_X.to(torch.float64)
            hits_per_bin += torch.bincount(bins_X, weights=hits_X, minlength=_BINS)
            hits_log_hits += torch.special.xlogy(hits_X, hits_X).sum()
        owners[rank] = hits_per_bin.sum()
        parts = torch.cat([slots_per_bin, hits_per_bin, owners, torch.stack([hits_log_hits, ever])])
        if world > 1:
            dist.all_reduce(parts, group=group)
        self.window_R.zero_()
        slots_per_bin, hits_per_bin, owners, (hits_log_hits, ever) = parts.cpu().split([_BINS, _BINS, world, 2])
        return _health(slots, slots_per_bin, hits_per_bin, owners, float(hits_log_hits), int(ever))


def _health(slots, slots_per_bin, hits_per_bin, owners, hits_log_hits: float, ever: int) -> MemoryHealth:
    hits = float(hits_per_bin.sum())
    entropy = math.log(hits) - hits_log_hits / hits if hits else math.nan
    # an average within a bin: exact below 128 hits, where a bin holds one value
    mean_hits = hits_per_bin / slots_per_bin.clamp(min=1)
    taken = slots_per_bin.flip(0).cumsum(0)
    before = taken - slots_per_bin.flip(0)
    top = max(1, slots // 100)
    in_top = (torch.clamp(taken, max=top) - torch.clamp(before, max=top)) * mean_hits.flip(0)
    filled = slots_per_bin.nonzero().flatten().tolist()
    return MemoryHealth(
        slots=slots,
        used_share=ever / slots,
        window_used_share=float(slots_per_bin[1:].sum()) / slots,
        dead_slots=slots - ever,
        entropy_ratio=entropy / math.log(slots) if slots > 1 else 1.0,
        kl_to_uniform=math.log(slots) - entropy,
        top1pct_share=float(in_top.sum()) / hits if hits else 0.0,
        owner_load_max_over_mean=float(owners.max() / owners.mean()) if hits else 1.0,
        hits=int(hits),
        hits_per_owner=[int(x) for x in owners],
        histogram=[(float(mean_hits[b]), int(slots_per_bin[b])) for b in filled],
    )
