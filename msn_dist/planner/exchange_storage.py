"""What a memory's look-up and its exchange hold on a rank, in both directions, for every strategy.

No formula is kept beside the strategies: their own code runs on fake tensors, over an exchange that returns empty
buffers of the right size, so that what is counted here is what they do.  The load is the expected one of the busiest
owner, or where `distinct` is None owners are hit alike; every rank has the same number of bags.

Shape suffixes: M bags of a rank, L hits a bag, H hits, W ranks, G bags looked up, D value width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from msn_dist.planner.layout import Layout
from msn_dist.planner.live_bytes import LiveBytes
from msn_dist.planner.loopback import Distinct, Expected, LoopbackExchange, bare_table

aten = torch.ops.aten
_GROUPS = 8  # up to which two_level is run as it is


@dataclass(frozen=True)
class ExchangeBytes:
    """Bytes of one look-up on one rank; its output and the gradient of it, [M, D], belong to the model."""

    kept: int  # from step to step, beside the table
    saved: int  # from its forward to its backward
    keeps_output: bool  # what is saved includes the output
    forward: int  # most during the forward, beyond what was there; the output is in it
    backward: int  # most during the backward, beyond what was there and saved


@lru_cache(maxsize=4096)
def exchange_bytes(
    layout: Layout,
    slots: int,
    dim: int,
    bags: int,
    hits: int,
    *,
    chunks: int = 1,
    distinct: Distinct | None = None,
    device_type: str = "cpu",
    autocast: bool = False,
) -> ExchangeBytes:
    """For `bags` bags of `hits` hits on every rank, in a table of `slots` rows of `dim` values.

    `chunks` as in MemoryConfig, all of one size.  `distinct` is None where slots are hit alike.  `autocast`: sums reach
    the model as bfloat16.
    """
    rest = {"chunks": chunks, "distinct": distinct, "device_type": device_type, "autocast": autocast}
    if layout.strategy == "two_level" and layout.groups > _GROUPS:

        def of(groups: int) -> ExchangeBytes:
            world = groups * layout.ranks_of_group
            block = -(-slots // layout.world)  # as many rows an owner, of which as many are hit
            there = distinct and replace(distinct, of_all=round(distinct.of_all * world / layout.world))
            smaller = replace(layout, world=world)
            return exchange_bytes(smaller, block * world, dim, bags, hits, **rest | {"distinct": there})

        return _extrapolated(of(_GROUPS // 2), of(_GROUPS), layout.groups)
    bags = -(-bags // chunks)
    expected = Expected(layout, slots, bags, hits, chunks, distinct)
    exchange = LoopbackExchange(expected)
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        values = bare_table(expected, dim, exchange)
        slots_ML = torch.empty(bags, hits, dtype=torch.int64)
        leaf_ML = torch.empty(bags, hits, requires_grad=True)
        with _LookUpBytes(expected, on_gpu=device_type == "cuda") as counted:
            for _ in range(2):  # the first step leaves behind what the look-up keeps
                leaf_ML.grad = None
                weights_ML = leaf_ML * 1
                base = counted.peak = counted.live
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    if chunks == 1:
                        pooled = [values(slots_ML, weights_ML)]
                    else:
                        pooled = values.pooled_in_chunks((slots_ML, weights_ML) for _ in range(chunks))
                forward, with_output = counted.peak - base, counted.live - base
                model_MD = torch.cat(pooled) * 2  # in place of the model; saves nothing for its backward
                del pooled
                output = model_MD.numel() * model_MD.element_size()
                saved = counted.live - base - output
                gradient_MD = torch.empty_like(model_MD)
                counted.peak = 0
                model_MD.backward(gradient_MD)
                backward = counted.peak - base - saved - 3 * output  # what the model made, and two gradients
                del model_MD, gradient_MD, weights_ML
    kept = getattr(values.lookup, "kept_bytes", 0)
    return ExchangeBytes(kept, saved, with_output - saved < output, forward, backward)


def _extrapolated(less: ExchangeBytes, more: ExchangeBytes, groups: int) -> ExchangeBytes:
    """Buffers of two_level grow linearly with the groups; torch is slow at cutting one into thousands."""
    half = _GROUPS // 2
    grown = {
        kind: getattr(more, kind) + (getattr(more, kind) - getattr(less, kind)) * (groups - _GROUPS) // half
        for kind in ("kept", "saved", "forward", "backward")
    }
    return replace(more, **grown)


class _LookUpBytes(LiveBytes):
    """Live bytes, where what depends on data has the expected size."""

    def __init__(self, expected: Expected, on_gpu: bool) -> None:
        super().__init__(on_gpu)
        self._expected = expected

    def guess(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if func is aten.bincount.default:
            return args[0].new_empty(args[2] if len(args) > 2 else kwargs["minlength"])
        if func is aten._unique2.default:
            (hits,) = args[:1]
            self.scratch(hits.numel() * (hits.element_size() + 16))  # hits sorted, their order and the inverse
            touched = hits.new_empty(self._expected.updated(hits.numel()))
            return touched, torch.empty_like(hits, dtype=torch.int64), hits.new_empty(0)
        if func is aten.nonzero.default:  # rows of a block that any rank has hit
            return args[0].new_empty((self._expected.stepped, args[0].ndim), dtype=torch.int64)
        if func is aten._local_scalar_dense.default:  # the number of a step
            return 1
        if func is aten.repeat_interleave.Tensor:
            return args[0].new_empty(kwargs["output_size"])
        if func is aten.index.Tensor and args[1][0].dtype == torch.bool:  # rows that this rank counts
            return args[0].new_empty(args[0].numel() // self._expected.layout.world)
        return None

    def note(self, func: Any, args: tuple, *_: Any) -> None:
        if func is aten._embedding_bag_backward.default:
            self.scratch(36 * args[1].numel())  # hits sorted, their order, bags and weights
        if func is aten.sort.default and self._on_gpu:
            self.scratch(args[0].numel() * (args[0].element_size() + 16))  # radix sort: as much again, and places
