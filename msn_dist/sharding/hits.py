"""What an owner looks up, and the differentiable look-up of it.

Shape suffixes: H hits, G bags, L hits of every bag where they are equal, D value width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torchrec.streamable import Multistreamable

from msn_dist.sharding.lookup import Lookup
from msn_dist.sharding.sums import weights_gradient


@dataclass
class Hits(Multistreamable):
    """Bag g holds hits offsets[g] to offsets[g + 1] - 1."""

    rows_H: Tensor  # int32 (int64 for more than 2^31 rows a rank), local to the owner
    weights_H: Tensor | None  # None: the rows themselves, one a bag
    offsets_G1: Tensor  # int64
    size: int | None = None  # L, where all bags are known to be equal
    tape: Any = None  # what a look-up keeps for its update

    @staticmethod
    def uniform(rows_H: Tensor, weights_H: Tensor | None, size: int) -> Hits:
        """Bags of `size` hits each, one after the other."""
        offsets_G1 = torch.arange(0, len(rows_H) + 1, size, device=rows_H.device)
        return Hits(rows_H, weights_H, offsets_G1, size)

    def bag_H(self) -> Tensor:
        """The bag of each hit, int64."""
        repeats = self.offsets_G1.diff() if self.size is None else self.size
        bag_G = torch.arange(len(self.offsets_G1) - 1, device=self.rows_H.device)
        # told how many, torch need not ask the device
        return bag_G.repeat_interleave(repeats, output_size=len(self.rows_H))

    def record_stream(self, stream: torch.Stream) -> None:
        for tensor in (self.rows_H, self.weights_H, self.offsets_G1):
            if tensor is not None:
                tensor.record_stream(stream)


@dataclass
class Round:
    """The look-ups of one forward: their rows are updated together, when the last has its gradient.

    An update a look-up would apply the optimizer several times in a step, and the gradients of the weights
    would see values that the step has changed already.
    """

    size: int = 1
    done: list[tuple[Hits, Tensor]] = field(default_factory=list)


def look_up(lookup: Lookup, hits: Hits, world: int, part_of: Round, dtype: torch.dtype = torch.float32) -> Tensor:
    """pooled_GD, rounded to `dtype`; its backward updates the rows and gives each weight its gradient.

    Rows get the mean of the ranks' gradients, as dense parameters do; a weight belongs to one rank and
    gets its gradient whole.
    """
    return _LookUp.apply(hits.weights_H, lookup.anchor, lookup, hits, world, part_of, dtype)


class _LookUp(Function):
    @staticmethod
    def forward(ctx, weights_H, anchor, lookup, hits, world, part_of, dtype):
        if weights_H is not None:
            weights_H = weights_H.detach()
        ctx.lookup, ctx.world, ctx.part_of = lookup, world, part_of
        ctx.hits = replace(hits, weights_H=weights_H)
        return lookup.read(ctx.hits, ctx.needs_input_grad[1] and part_of.size == 1, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_GD):
        lookup, hits, part_of = ctx.lookup, ctx.hits, ctx.part_of
        if ctx.world > 1:
            gradient_GD = gradient_GD / ctx.world
        if part_of.size == 1:
            gradient_H = lookup.update(hits, gradient_GD)
        else:
            gradient_H = None
            if hits.weights_H is not None:
                gradient_H = weights_gradient(lookup.weight_RD, hits, gradient_GD)
            part_of.done.append((hits, gradient_GD))
            if len(part_of.done) == part_of.size:
                all_hits, gradients = zip(*part_of.done, strict=True)
                part_of.done = []
                lookup.update(_joined(all_hits), torch.cat(gradients), of_weights=False)
        if ctx.world > 1 and gradient_H is not None:
            gradient_H = gradient_H * ctx.world
        return gradient_H, None, None, None, None, None, None


def _joined(parts: tuple[Hits, ...]) -> Hits:
    lengths_G = torch.cat([part.offsets_G1.diff() for part in parts])
    weights = [part.weights_H for part in parts if part.weights_H is not None]
    sizes = {part.size for part in parts}
    return Hits(
        torch.cat([part.rows_H for part in parts]),
        torch.cat(weights) if weights else None,
        offsets_of(lengths_G),
        size=sizes.pop() if len(sizes) == 1 else None,
    )


def offsets_of(lengths_G: Tensor) -> Tensor:
    """offsets_G1, int64."""
    return torch.nn.functional.pad(lengths_G.to(torch.int64).cumsum(0), (1, 0))
