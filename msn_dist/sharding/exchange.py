"""Differentiable collectives of the memory exchange, and the count of what they send.

Two collectives carry everything: `all_to_all` takes hits to the owners of their rows, `sum_at_home`
brings the owners' partial sums back.  Both work on gloo and NCCL, with any number of bags or hits
on any rank, none included; every rank must call them in the same order.

Shape suffixes: W ranks, G bags of all ranks (rank after rank), M bags of this rank, H hits, D value width.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function, once_differentiable


class Traffic(Counter):
    """Bytes this rank has sent to other ranks, by what they carried."""

    def add(self, name: str, sent: Tensor, splits: list[int], rank: int) -> None:
        """Count a message whose first dimension is split over the ranks as `splits` says."""
        rows = sum(splits)
        if rows:
            self[name] += (rows - splits[rank]) * (sent.numel() // rows) * sent.element_size()


class Exchange:
    """The collectives of one memory over one process group, with their byte counts."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.world = group.rank(), group.size()
        self.traffic = Traffic()

    def swap_counts(self, counts_WC: Tensor) -> list[list[int]]:
        """Row w goes to rank w; returns the rows received, on the host: splits must be known there."""
        return self._all_to_all("counts", counts_WC, [1] * self.world, [1] * self.world).tolist()

    def all_to_all(self, name: str, sent: Tensor, send_splits: list[int], receive_splits: list[int]) -> Tensor:
        """Slices of `sent` along dim 0, one to each rank; differentiable where `sent` is floating."""
        return _AllToAll.apply(sent, self, name, send_splits, receive_splits)

    def sum_at_home(self, partial_GD: Tensor, bags_per_rank: list[int]) -> Tensor:
        """pooled_MD: for this rank's bags, the sum of the partial sums that all ranks hold.

        A reduce-scatter over uneven counts, (W - 1) * M * D elements sent in either direction.
        """
        return _SumAtHome.apply(partial_GD, self, bags_per_rank)

    def _all_to_all(self, name: str, sent: Tensor, send_splits: list[int], receive_splits: list[int]) -> Tensor:
        self.traffic.add(name, sent, send_splits, self.rank)
        if self.world == 1:
            return sent.view_as(sent)
        received = sent.new_empty(sum(receive_splits), *sent.shape[1:])
        with torch.profiler.record_function(f"## exchange {name} ##"):
            dist.all_to_all_single(received, sent.contiguous(), receive_splits, send_splits, group=self.group)
        return received


class _AllToAll(Function):
    @staticmethod
    def forward(ctx, sent, exchange, name, send_splits, receive_splits):
        ctx.exchange, ctx.name, ctx.splits = exchange, name, (send_splits, receive_splits)
        return exchange._all_to_all(name, sent, send_splits, receive_splits)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        send_splits, receive_splits = ctx.splits
        returned = ctx.exchange._all_to_all(f"{ctx.name}_gradient", gradient, receive_splits, send_splits)
        return returned, None, None, None, None


class _SumAtHome(Function):
    @staticmethod
    def forward(ctx, partial_GD, exchange, bags_per_rank):
        ctx.exchange, ctx.bags_per_rank = exchange, bags_per_rank
        bags = bags_per_rank[exchange.rank]
        received = exchange._all_to_all("pooled", partial_GD, bags_per_rank, [bags] * exchange.world)
        return received.unflatten(0, (exchange.world, bags)).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_MD):
        exchange, bags_per_rank = ctx.exchange, ctx.bags_per_rank
        bags = bags_per_rank[exchange.rank]
        everywhere = gradient_MD.repeat(exchange.world, 1)
        gradient_GD = exchange._all_to_all("pooled_gradient", everywhere, [bags] * exchange.world, bags_per_rank)
        return gradient_GD, None, None


class _ScaleGradient(Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x, whose gradient is multiplied by `factor` on its way back."""
    return _ScaleGradient.apply(x, factor) if factor != 1 else x
