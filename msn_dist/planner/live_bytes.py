"""Bytes of the tensors that live while code runs on fake tensors, which have shapes and lifetimes but no data."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from msn_dist.planner.partial_sums import partial_sums_bytes

aten = torch.ops.aten
_WIDENING = {aten.add, aten.sub, aten.mul, aten.div, aten.add_, aten.sub_, aten.mul_, aten.div_}


class LiveBytes(TorchDispatchMode):
    """Under a FakeTensorMode: `live` bytes of what has been made since, and their `peak`.

    Only what passes torch's dispatcher is seen; of the scratch inside operators only the copies that a CPU makes of
    what it widens, and the partial sums of a GPU.
    """

    def __init__(self, on_gpu: bool) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._on_gpu = on_gpu
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.prim.device.default:  # half of all that comes here; says it at once
            return args[0].fake_device
        kwargs = kwargs or {}
        result = self.guess(func, args, kwargs)
        if result is None:
            result = func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        given = {x.untyped_storage()._cdata for x in inputs}  # may be older than this mode
        new = [out for out in outputs if out.untyped_storage()._cdata not in given]
        for output in new:
            self._count(output.untyped_storage())
        if not self._on_gpu and func._overloadpacket in _WIDENING:
            self.scratch(_widened(inputs))
        elif self._on_gpu and func is aten.sum.dim_IntList:
            self.scratch(partial_sums_bytes(inputs[0], args[1] or ()))
        if new or func._schema.is_mutable:
            self.note(func, args, kwargs, result, inputs, outputs)
        return result

    def guess(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """A result of the right shape where torch needs data to tell it, else None."""

    def note(self, func: Any, args: tuple, kwargs: dict, result: Any, inputs: list, outputs: list) -> None:
        """Called for every operation but views."""

    def scratch(self, size: int) -> None:
        """So many bytes live for a moment."""
        self.peak = max(self.peak, self.live + size)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def died(_: Any) -> None:
            self.live -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, died)
        self.live += size
        self.peak = max(self.peak, self.live)


def _widened(operands: list[Tensor]) -> int:
    """Bytes of the copies of operands that are narrower than others."""
    arrays = [x for x in operands if x.ndim and x.dtype.is_floating_point]
    widest = max((x.element_size() for x in arrays), default=0)
    return sum(widest * x.numel() for x in arrays if x.element_size() < widest)
