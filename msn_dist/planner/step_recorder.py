"""Operations of a training step, and the bytes that live between the look-ups of its tables.

Shape suffixes: B rows, T tokens, D width, M bags of a look-up, L its hits a bag, V visits of experts, I and O widths in
and out, G experts.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from msn_dist.planner.live_bytes import LiveBytes

aten = torch.ops.aten


@dataclass(frozen=True)
class Op:
    """One operation that moves data; views are left out."""

    name: str  # as torch names it, for example "aten.mm"
    region: str  # of a memory "retrieval", up to its look-up, and "gate"; "dense": the rest; "optimizer"
    backward: bool
    flops: int  # of matrix products, 0 of the rest
    bytes: int  # read and written, every tensor once
    out_elements: int
    shapes: tuple[tuple[int, ...], ...]  # of the tensors it reads
    dtype: str  # of its first output


@dataclass(frozen=True)
class Span:
    """A stretch of the step in which nothing changes but what the model itself holds.

    `look_ups` are numbered in the order of the forward.
    """

    phase: str  # "forward", "backward" or "optimizer"
    live: (
        int  # most bytes at once, without parameters, their gradients and state, the batch and the outputs of look-ups
    )
    held: frozenset[int]  # look-ups between their forward and their backward
    outputs: frozenset[int]  # look-ups whose output [M, D] the model holds
    look_up: int | None = None  # one is under way: `live` is what it finds


@dataclass(frozen=True)
class LookUp:
    """A memory's, or one of the id tables'."""

    kind: str  # "ids" (summed embeddings), "sequences" (the embeddings themselves) or "memory"
    bags: int  # M: rows of its output
    hits: float  # L: of a bag; of id tables all ids of a row
    dim: int  # D: columns of its output
    itemsize: int = 4  # bytes of a number of it

    @property
    def output_bytes(self) -> int:
        return self.bags * self.dim * self.itemsize


class StepRecorder(LiveBytes):
    """Ops and spans of what runs under it.

    `events` and `top_k` tell what cannot be known without data: the lengths of lists, and how many pairs can win.
    """

    def __init__(self, events: list[int], top_k: int, on_gpu: bool) -> None:
        super().__init__(on_gpu)
        self.ops: list[Op] = []
        self.spans: list[Span] = []
        self.look_ups: list[LookUp] = []
        self.memories_at: list[int] = []  # ops before the look-ups of memories, in the forward and in the backward
        self._events = iter(events)
        self._pairs = sum(top_k // i for i in range(1, top_k + 1))
        self._phase = "forward"
        self._regions = [(0, "dense")]  # of the forward: number of the first autograd node, name
        self._held: set[int] = set()
        self._outputs: set[int] = set()

    def guess(self, func: Any, args: tuple, kwargs: dict) -> Tensor | None:
        if func is aten.repeat_interleave.Tensor:
            return args[0].new_empty(next(self._events))
        if func is aten.nonzero.default:
            return args[0].new_empty(self._pairs, 2, dtype=torch.int64)
        if func is aten._grouped_mm.default:
            return _grouped_mm(*args[:3])
        return None

    def note(self, func: Any, args: tuple, kwargs: dict, result: Any, inputs: list, outputs: list) -> None:
        if func._overloadpacket in _NO_DATA:
            return
        count = _FLOPS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
        flops = count(*args, **kwargs, out_val=result) if count else 0
        moved = sum(map(_bytes, inputs)) + sum(map(_bytes, outputs))
        shapes = tuple(tuple(x.shape) for x in inputs)
        elements = sum(out.numel() for out in outputs)
        dtype = str(outputs[0].dtype).removeprefix("torch.") if outputs else ""
        name = str(func._overloadpacket)
        self.ops.append(
            Op(name, self._region_now(), self._phase == "backward", int(flops), moved, elements, shapes, dtype)
        )

    def kernel(self, name: str, flops: int, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Note an operation that torch does not see."""
        moved = sum(map(_bytes, inputs)) + sum(map(_bytes, outputs))
        shapes = tuple(tuple(x.shape) for x in inputs)
        elements = sum(out.numel() for out in outputs)
        dtype = str(inputs[0].dtype).removeprefix("torch.")
        backward = self._phase == "backward"
        self.ops.append(Op(name, self._region_now(), backward, flops, moved, elements, shapes, dtype))

    def _cut(self) -> None:
        """End the span."""
        self.spans.append(Span(self._phase, self.peak, frozenset(self._held), frozenset(self._outputs)))
        self.peak = self.live

    def enter(self, phase: str) -> None:
        self._cut()
        self._phase = phase

    def look_up(self, look_up: LookUp) -> int:
        """Note the forward of one; returns its number."""
        self._cut()
        if look_up.kind == "memory":
            self._enter_region("gate")
            self.memories_at.append(len(self.ops))
        number = len(self.look_ups)
        self.look_ups.append(look_up)
        self._mark(number)
        self._held.add(number)
        return number

    def is_output(self, number: int, output_MD: Tensor) -> None:
        """Count it by its number instead of its bytes."""
        storage = output_MD.untyped_storage()

        def died(_: Any) -> None:
            self._cut()
            self._outputs.discard(number)
            del self._alive[storage_key]

        storage_key = storage._cdata
        self._alive[storage_key] = weakref.ref(storage, died)
        self.live -= storage.nbytes()
        self.peak = self.live
        self._outputs.add(number)

    def look_up_ends(self, number: int) -> None:
        """Note its backward."""
        self._cut()
        self._held.discard(number)
        self._mark(number)
        if self.look_ups[number].kind == "memory":
            self.memories_at.append(len(self.ops))

    def _mark(self, number: int) -> None:
        self.spans.append(Span(self._phase, self.live, frozenset(self._held), frozenset(self._outputs), number))

    def memory_begins(self, *_: Any) -> None:
        """Hook before a Memory's forward."""
        self._enter_region("retrieval")

    def memory_ends(self, *_: Any) -> None:
        """Hook after it."""
        self._enter_region("dense")

    def _enter_region(self, region: str) -> None:
        self._regions.append((torch.autograd._get_sequence_nr(), region))

    def _region_now(self) -> str:
        if self._phase == "optimizer":
            return "optimizer"
        node = torch._C._current_autograd_node()  # None in the forward; numbered in the order of the forward
        if node is None:
            return self._regions[-1][1]
        return next(region for first, region in reversed(self._regions) if first <= node._sequence_nr())


def _bytes(tensor: Tensor) -> int:
    """What there is to read: an expanded tensor has less than it shows."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _grouped_mm(a: Tensor, b: Tensor, ends_G: Tensor) -> Tensor:
    """[V, I] and [G, I, O] -> [V, O], or [I, V] and [V, O] -> [G, I, O]."""
    shape = (len(a), b.shape[2]) if b.ndim == 3 else (len(ends_G), len(a), b.shape[1])
    return a.new_empty(shape)


def _grouped_mm_flops(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.numel() * b.shape[-1]


_FLOPS = {aten._grouped_mm: _grouped_mm_flops}
_NO_DATA = {aten.empty, aten.new_empty, aten.empty_like, aten.empty_strided}
