"""Forward, backward and row-wise Adagrad of a value table: ours against FBGEMM's TBE.

All of it: pooled values, the gradient of the weights, and the step of the rows that were hit.  Slots are uniform, by
Zipf's law, or with one row in every bag.  Ours also with 2^31 rows of 16 values against 2^24: time of a hit and the
scratch memory must not grow with n.

A provider passes if, after one step from moments of zero, its rows, moments and gradient of the weights are those of
kernels/reference.py, computed in float64 from the hits of that step; and rows without a hit are as before.

Shape suffixes: R = n rows of a table, D its width, G bags, L hits of a bag, H hits, U rows that were hit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.kernel_tables import Hits, make_hits, make_table, make_tbe
from benchmarks.kernel_timing import OURS, Bench, Call, Case, release
from msn_dist.kernels import reference

ROWS, MANY_ROWS = 2**24, 2**31
BAGS = (32768, 32)  # bags and hits of each
SLOTS = ("uniform", "zipf", "hot")
LR, EPS = 0.5, 1e-8  # large, so that a step shows in 16-bit values
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SETS = 3  # of hits
_BYSTANDERS = 4096  # rows that are looked at, whether hit or not


class Table(NamedTuple):
    """What a step changes."""

    weight_RD: Tensor
    moment_R: Tensor


class Step(NamedTuple):
    """A provider's state and its call; the call returns the gradient of the weights [H]."""

    table: Table
    call: Call


def run(bench: Bench, quick: bool) -> None:
    """All providers at all shapes."""
    for dim in (64,) if quick else (64, 128):
        inputs = {slots: Inputs.made(slots, ROWS, dim) for slots in SLOTS}
        for dtype in ("bf16", "fp16", "fp32"):
            values_RD = make_table(ROWS, dim, DTYPES[dtype])
            for slots in SLOTS:
                _compare(bench, values_RD, inputs[slots], slots, dtype, peers=dtype != "bf16")
            del values_RD
            release()
    for n in (ROWS,) if quick else (ROWS, MANY_ROWS):
        values_RD = make_table(n, 16, torch.bfloat16)
        _compare(bench, values_RD, Inputs.made("uniform", n, 16), "uniform", "bf16", peers=False)
        del values_RD
        release()


@dataclass(frozen=True)
class Inputs:
    """Sets of hits, and the gradient of what they read."""

    sets: Sequence[Hits]
    gradient_GD: Tensor

    @classmethod
    def made(
        cls, slots: str, n: int, dim: int, bags: tuple[int, int] = BAGS, sets: int = _SETS, device: str = "cuda"
    ) -> Inputs:
        generator = torch.Generator(device).manual_seed(3)
        gradient_GD = torch.randn(bags[0], dim, generator=generator, device=device)
        return cls([make_hits(slots, n, *bags, seed, device) for seed in range(sets)], gradient_GD)


def _compare(bench: Bench, values_RD: Tensor, inputs: Inputs, slots: str, dtype: str, peers: bool) -> None:
    """Ours, which steps values_RD itself, and the TBE, which steps a copy."""
    bags, hits = inputs.sets[0].rows_GL.shape
    n, dim = values_RD.shape
    where = {"dtype": dtype, "slots": slots, "n": n, "bags": bags, "hits": hits, "dim": dim}
    case = Case("sparse update", "forward+backward+adagrad", where, _bytes(values_RD, inputs.sets[0]))
    providers = {OURS: ours, f"{OURS}, int32": partial(ours, rows_dtype=torch.int32)}
    if peers:
        providers["TBE"] = partial(tbe, dtype=DTYPES[dtype])
    for name, provider in providers.items():
        checked = Checked(values_RD, inputs, partial(provider, values_RD, inputs))
        bench.run(case, name, checked.make, checked.problem, len(inputs.sets), scratch=True)
        del checked
        release()


def _bytes(values_RD: Tensor, hits: Hits) -> float:
    """Must move: rows of all hits read; distinct rows and moments read and written; sums written, their gradient read;
    slots and weights read in both directions, the weights' gradient written."""
    (bags, per_bag), dim = hits.rows_GL.shape, values_RD.shape[1]
    row = dim * values_RD.element_size()
    distinct = len(hits.rows_GL.unique())
    return bags * per_bag * (row + 2 * 12 + 4) + distinct * 2 * (row + 4) + bags * dim * 8


def ours(values_RD: Tensor, inputs: Inputs, rows_dtype: torch.dtype = torch.int64) -> Step:
    from msn_dist.kernels.sparse_gather import sparse_gather
    from msn_dist.kernels.sparse_update import RowState, RowwiseAdagrad, sparse_update

    state, rule = RowState(torch.zeros(len(values_RD), device=values_RD.device)), RowwiseAdagrad(LR, EPS)

    bags = [(hits.rows_GL.to(rows_dtype), hits.weights_GL) for hits in inputs.sets]

    def call(i: int) -> Tensor:
        rows_GL, weights_GL = bags[i]
        sparse_gather(values_RD, rows_GL, weights_GL)
        return sparse_update(values_RD, state, rows_GL, weights_GL, None, inputs.gradient_GD, rule)

    return Step(Table(values_RD, state.moment_R), call)


def tbe(values_RD: Tensor, inputs: Inputs, dtype: torch.dtype) -> Step:
    made = make_tbe(values_RD, dtype, torch.float32, LR, EPS)
    flat = [(hits.rows_GL.flatten(), hits.offsets_G1(), hits.weights_GL.flatten()) for hits in inputs.sets]

    def call(i: int) -> Tensor:
        rows_H, offsets_G1, weights_H = flat[i]
        leaf_H = weights_H.detach().requires_grad_()
        made.read(rows_H, offsets_G1, leaf_H).backward(inputs.gradient_GD)
        return leaf_H.grad

    return Step(Table(made.weight_RD, made.moment_R), call)


class Checked:
    """A provider's first step from moments of zero, beside the reference's."""

    def __init__(self, values_RD: Tensor, inputs: Inputs, provider: partial[Step]) -> None:
        self._provider, self._inputs = provider, inputs
        generator = torch.Generator(values_RD.device).manual_seed(8)
        some = torch.randint(len(values_RD), (_BYSTANDERS,), generator=generator, device=values_RD.device)
        # Bystanders are rows of the truth without hits, so that their gradient is zero.
        self._rows_U, where = torch.cat([inputs.sets[0].rows_GL.flatten(), some]).unique(return_inverse=True)
        self._where_H = where[: -len(some)]
        self._table: Table | None = None
        self._before_UD = values_RD[self._rows_U]

    def make(self) -> Call:
        self._table, call = self._provider()
        return call

    def problem(self, weights_gradient: Tensor) -> str | None:
        """What is wrong after the step, or None."""
        hits, gradient_GD = self._inputs.sets[0], self._inputs.gradient_GD.double()
        offsets_G1, weights_H = hits.offsets_G1(), hits.weights_GL.flatten().double()
        values_UD = self._before_UD.double()
        want_H = reference.weights_gradient(values_UD, self._where_H, offsets_G1, gradient_GD)
        gradient_HD = gradient_GD.repeat_interleave(hits.rows_GL.shape[1], dim=0) * weights_H[:, None]
        gradient_UD = torch.zeros_like(values_UD).index_add_(0, self._where_H, gradient_HD)
        moment_U = torch.zeros(len(values_UD), dtype=torch.float64, device=values_UD.device)
        reference.rowwise_adagrad_(values_UD, moment_U, gradient_UD, LR, EPS)
        weight_RD, moment_R = self._table
        after_UD = weight_RD[self._rows_U]
        still_U = moment_U == 0
        if not torch.equal(after_UD[still_U], self._before_UD[still_U]):
            return "a row without a hit has changed"
        for what, got, want, relative, absolute in (
            ("gradients of weights", weights_gradient.flatten(), want_H, 1e-4, 1e-4),
            ("moments", moment_R[self._rows_U], moment_U, 1e-3, 0.0),
            ("rows", after_UD, values_UD, torch.finfo(weight_RD.dtype).eps, 1e-3 * LR),
        ):
            wrong = (got.double() - want).abs() > absolute + relative * want.abs()
            if count := int((wrong | got.isnan().reshape(wrong.shape)).sum()):
                return f"{count:,} of {wrong.numel():,} {what} differ"
        return None
