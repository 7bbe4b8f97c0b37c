"""Product-key retrieval: ours, torch eager, torch.compile, and RAFT's selection in torch.topk's place.

The list of pairs that can win (reference.pair_candidates) waits for the device, so peers make it before they are timed.
"scores fp32": both score products with float32 results from bf16 operands, as ours are; "scores bf16": results
rounded to bf16, half the bytes for the peers' selections, which are then not exact.  RAFT's radix selections leave the
k best in no order: either torch.sort orders them, or all k * k pairs take part.

A provider passes if the true scores of the slots that it selected are those of `reference.retrieve`, its weights are
their softmax, and its gradients those of that softmax; each within the rounding of its scores.

Ours takes both axes in one tensor, and peers take them apart, as either is fastest.

Shape suffixes: A = 2 axes, M queries, H = 1 heads, N sub-keys of an axis, E key width of one half, K hits, C pairs that
can win.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.kernel_airtopk import AUTO, RADIX_8_BITS, RADIX_11_BITS, AirTopK
from benchmarks.kernel_timing import OURS, Bench, Call, Case
from msn_dist.kernels import reference

_SETS = 3  # of inputs
_TRUTH_SCORES = 2**27  # at a time

Joined = tuple[Tensor, Tensor]  # queries_AMHE, keys_AHNE
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # row and column queries [M, 1, E], row and column keys [1, N, E]
Selection = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # scores_MN, k -> best_MK, index_MK
Retrieval = Callable[[Inputs | Joined], tuple[Tensor, Tensor]]  # slots_MK, weights_MK
Outputs = tuple[Tensor, Tensor, tuple[Tensor, ...]]  # slots_MK, weights_MK, gradients of the inputs or none


@dataclass(frozen=True)
class Shape:
    queries: int
    sub_keys: int
    key_dim: int
    k: int
    compiled: bool = False  # torch.compile takes seconds a shape

    @property
    def tau(self) -> float:
        return self.key_dim**-0.5

    def case(self, mode: str) -> Case:
        """2 score products of 2 * M * N * E operations; queries and keys read, slots and weights written."""
        operands = 2 * (self.queries + self.sub_keys) * self.key_dim * 2
        moved, flops = operands + self.queries * self.k * 12, 4.0 * self.queries * self.sub_keys * self.key_dim
        if mode != "forward":  # operands, slots, weights and their gradient read; the operands' gradients written
            moved += 2 * operands + self.queries * self.k * 16
        where = {"dtype": "bf16", "queries": self.queries, "sub_keys": self.sub_keys, "key_dim": self.key_dim}
        return Case("retrieval", mode, where | {"k": self.k}, moved, flops)

    def inputs(self, seed: int, device: str) -> Joined:
        """Normal values, which is what LayerNorm leaves."""
        generator = torch.Generator(device).manual_seed(seed)
        make = partial(torch.randn, generator=generator, device=device)
        queries_AMHE = torch.stack([make(self.queries, 1, self.key_dim).bfloat16() for _ in range(2)])
        return queries_AMHE, torch.stack([make(1, self.sub_keys, self.key_dim).bfloat16() for _ in range(2)])


SHAPES = (
    Shape(32768, 1024, 64, 32, compiled=True),
    Shape(32768, 4096, 64, 32, compiled=True),
    Shape(16384, 32768, 64, 32, compiled=True),
    Shape(8192, 1024, 128, 64, compiled=True),
    Shape(32768, 256, 64, 32, compiled=True),
    Shape(8192, 64, 32, 8),
    Shape(8192, 4096, 64, 128),
)
QUICK_SHAPES = (SHAPES[0], SHAPES[4])


@dataclass(frozen=True)
class Rounding:
    """What a provider's scores may be off: `score` of the largest one; relative errors of weights and gradients."""

    score: float
    weight: float
    gradient: float


EXACT = Rounding(score=3e-5, weight=1e-3, gradient=1e-2)
# Two axis scores and their sum are rounded to 8 bits, in the slot that is taken and in the one that is left.
BF16 = Rounding(score=6 * 2**-8, weight=0.3, gradient=0.1)


def run(bench: Bench, quick: bool, airtopk: Path) -> None:
    """All providers at all shapes, forward and with the backward."""
    for shape in QUICK_SHAPES if quick else SHAPES:
        sets = [shape.inputs(seed, "cuda") for seed in range(_SETS)]
        truth = Truth(sets[0], shape)
        for mode in ("forward", "forward+backward"):
            case = shape.case(mode)
            for name, make, rounding in providers(shape, airtopk, mode):
                check = partial(truth.problem, rounding=rounding)
                call = partial(_call, make, sets, shape, mode, joined=name == OURS)
                bench.run(case, name, call, check, _SETS)
            if mode == "forward":
                bench.run(case, "score products alone, bf16", partial(_products_alone, sets), sets=_SETS)


def providers(shape: Shape, airtopk: Path, mode: str) -> Iterator[tuple[str, Callable[[], Retrieval], Rounding]]:
    """Name, what makes the provider, and its rounding."""
    yield OURS, partial(_ours, shape, mode), EXACT
    for kind, dtype, rounding in (("fp32", torch.float32, EXACT), ("bf16", torch.bfloat16, BF16)):
        yield f"eager, scores {kind}", partial(_eager, shape, dtype), rounding
        if shape.compiled:
            yield f"compile, scores {kind}", partial(_compiled, shape, dtype), rounding
        yield f"airtopk, scores {kind}", partial(_airtopk, shape, dtype, airtopk, RADIX_11_BITS), rounding
        if mode == "forward":
            yield f"airtopk 8 bits, scores {kind}", partial(_airtopk, shape, dtype, airtopk, RADIX_8_BITS), rounding
            yield f"airtopk pairs, scores {kind}", partial(_airtopk_pairs, shape, dtype, airtopk), rounding
            yield f"raft auto, scores {kind}", partial(_raft_auto, shape, dtype, airtopk), rounding


def _apart(joined: Joined) -> Inputs:
    return *joined[0].unbind(), *joined[1].unbind()


def _call(make: Callable[[], Retrieval], sets: list[Joined], shape: Shape, mode: str, *, joined: bool = False) -> Call:
    """i -> Outputs of input set i; `joined` as it is, else apart."""
    retrieval = make()
    sets = sets if joined else [_apart(inputs) for inputs in sets]
    if mode == "forward":

        def forward(i: int) -> Outputs:
            with torch.no_grad():
                return *retrieval(sets[i]), ()

        return forward
    leaves = [tuple(operand.clone().requires_grad_() for operand in inputs) for inputs in sets]
    gradient_MK = weights_gradient(shape, sets[0][0].device)

    def both(i: int) -> Outputs:
        slots_MK, weights_MK = retrieval(leaves[i])
        gradients = torch.autograd.grad(weights_MK, leaves[i], gradient_MK)
        return slots_MK, weights_MK.detach(), _apart(gradients) if joined else gradients

    return both


def weights_gradient(shape: Shape, device: torch.device) -> Tensor:
    """gradient_MK, float32, of the weights in place j of a query, whichever slot is there."""
    generator = torch.Generator(device).manual_seed(9)
    return torch.randn(shape.queries, shape.k, generator=generator, device=device)


def _products_alone(sets: list[Joined]) -> Call:
    def products(i: int) -> tuple[Tensor, Tensor]:
        row_queries_MHE, col_queries_MHE, row_keys_HNE, col_keys_HNE = _apart(sets[i])
        return row_queries_MHE[:, 0] @ row_keys_HNE[0].T, col_queries_MHE[:, 0] @ col_keys_HNE[0].T

    return products


def _ours(shape: Shape, mode: str) -> Retrieval:
    if mode == "forward":
        from msn_dist.kernels.retrieval import retrieve
    else:
        from msn_dist.kernels.ops import retrieve

    def retrieval(inputs: Joined) -> tuple[Tensor, Tensor]:
        slots_MHK, weights_MHK = retrieve(*inputs, shape.k, shape.tau)
        return slots_MHK[:, 0], weights_MHK[:, 0]

    return retrieval


def _eager(shape: Shape, dtype: torch.dtype, device: str = "cuda") -> Retrieval:
    best = partial(torch.topk, dim=1)
    pairs_C = reference.pair_candidates(shape.k, device)
    return partial(_retrieve, shape=shape, dtype=dtype, best=best, best_pairs=best, pairs_C=pairs_C)


def _compiled(shape: Shape, dtype: torch.dtype) -> Retrieval:
    torch.compiler.reset()
    eager = _eager(shape, dtype)
    return torch.compile(lambda inputs: eager(inputs), dynamic=False)


def _airtopk(shape: Shape, dtype: torch.dtype, path: Path, algorithm: int) -> Retrieval:
    select = _differentiable(partial(AirTopK(path).select, algorithm=algorithm))

    def sorted_best(scores_MN: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best_MK, index_MK = select(scores_MN, k)
        best_MK, order_MK = best_MK.sort(dim=1, descending=True)
        return best_MK, index_MK.gather(1, order_MK)

    pairs_C = reference.pair_candidates(shape.k, "cuda")
    return partial(_retrieve, shape=shape, dtype=dtype, best=sorted_best, best_pairs=select, pairs_C=pairs_C)


def _airtopk_pairs(shape: Shape, dtype: torch.dtype, path: Path) -> Retrieval:
    select = partial(AirTopK(path).select, algorithm=RADIX_11_BITS)
    one_to_k = torch.arange(shape.k, device="cuda")
    pairs_C = one_to_k.repeat_interleave(shape.k), one_to_k.repeat(shape.k)
    return partial(_retrieve, shape=shape, dtype=dtype, best=select, best_pairs=select, pairs_C=pairs_C)


def _raft_auto(shape: Shape, dtype: torch.dtype, path: Path) -> Retrieval:
    select = partial(AirTopK(path).select, algorithm=AUTO)
    pairs_C = reference.pair_candidates(shape.k, "cuda")
    return partial(_retrieve, shape=shape, dtype=dtype, best=select, best_pairs=select, pairs_C=pairs_C)


def _differentiable(select: Selection) -> Selection:
    """The values are gathered where a gradient is to come back through them."""

    def selection(scores_MN: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best_MK, index_MK = select(scores_MN.detach(), k)
        return (scores_MN.gather(1, index_MK) if scores_MN.requires_grad else best_MK), index_MK

    return selection


def _retrieve(
    inputs: Inputs,
    shape: Shape,
    dtype: torch.dtype,
    best: Selection,
    best_pairs: Selection,
    pairs_C: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """As reference.product_key_topk, by any selections; `best` must be sorted unless pairs_C are all pairs."""
    row_queries_MHE, col_queries_MHE, row_keys_HNE, col_keys_HNE = inputs
    row_best_MK, row_index_MK = best(_scores(row_queries_MHE[:, 0], row_keys_HNE[0], dtype), shape.k)
    col_best_MK, col_index_MK = best(_scores(col_queries_MHE[:, 0], col_keys_HNE[0], dtype), shape.k)
    i_C, j_C = pairs_C
    scores_MK, winners_MK = best_pairs(row_best_MK.index_select(1, i_C) + col_best_MK.index_select(1, j_C), shape.k)
    row_MK = row_index_MK.gather(1, i_C[winners_MK])
    col_MK = col_index_MK.gather(1, j_C[winners_MK])
    weights_MK = (scores_MK.float() * shape.tau).softmax(dim=1)
    return row_MK * shape.sub_keys + col_MK, weights_MK


def _scores(queries_ME: Tensor, keys_NE: Tensor, dtype: torch.dtype) -> Tensor:
    """scores_MN, accumulated in float32."""
    if dtype == queries_ME.dtype:
        return queries_ME @ keys_NE.T
    return _WideProduct.apply(queries_ME, keys_NE)


class _WideProduct(torch.autograd.Function):
    """float32 products of 16-bit operands; the gradient goes back through 16-bit products."""

    @staticmethod
    def forward(ctx, queries_ME: Tensor, keys_NE: Tensor) -> Tensor:
        ctx.save_for_backward(queries_ME, keys_NE)
        if not queries_ME.is_cuda:  # torch has the other on CUDA alone
            return queries_ME.float() @ keys_NE.float().T
        return torch.mm(queries_ME, keys_NE.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, gradient_MN: Tensor) -> tuple[Tensor, Tensor]:
        queries_ME, keys_NE = ctx.saved_tensors
        narrow_MN = gradient_MN.to(queries_ME.dtype)
        return narrow_MN @ keys_NE, narrow_MN.T @ queries_ME


class Truth:
    """What one input set should give, from kernels/reference.py in float32."""

    def __init__(self, inputs: Joined, shape: Shape) -> None:
        self._inputs, self._shape = _apart(inputs), shape
        queries_AMHE, keys_AHNE = inputs
        parts = queries_AMHE.split(max(1, _TRUTH_SCORES // shape.sub_keys), dim=1)
        slots_MK = torch.cat([reference.retrieve(part, keys_AHNE, shape.k, shape.tau)[0][:, 0] for part in parts])
        self._best_MK = self._scores_of(slots_MK, self._inputs).sort(dim=1, descending=True).values
        self._largest = self._best_MK.abs().max().item()

    def problem(self, outputs: Outputs, rounding: Rounding) -> str | None:
        """What is wrong with a provider's outputs, or None."""
        slots_MK, weights_MK, gradients = outputs
        if slots_MK.min() < 0 or slots_MK.max() >= self._shape.sub_keys**2:
            return "slots lie outside the table"
        if (slots_MK.sort(dim=1).values.diff(dim=1) == 0).any():
            return "a slot is selected twice"
        leaves = tuple(operand.clone().requires_grad_() for operand in self._inputs)
        with torch.set_grad_enabled(bool(gradients)):
            scores_MK = self._scores_of(slots_MK, leaves)
            true_MK = scores_MK.softmax(dim=1)
        beaten = (self._best_MK - scores_MK.detach().sort(dim=1, descending=True).values).max().item()
        if not beaten <= rounding.score * self._largest:
            return f"slots are beaten by {beaten:.3g}, and the largest score is {self._largest:.3g}"
        off = ((weights_MK - true_MK) / true_MK).abs().max().item()
        if not off <= rounding.weight:
            return f"a weight is off by {off:.3g} of itself"
        if not gradients:
            return None
        gradient_MK = weights_gradient(self._shape, slots_MK.device)
        for got, want in zip(gradients, torch.autograd.grad(true_MK, leaves, gradient_MK), strict=True):
            off = ((got.float() - want.float()).norm() / want.float().norm()).item()
            if not off <= rounding.gradient:
                return f"a gradient is off by {off:.3g} of its norm"
        return None

    def _scores_of(self, slots_MK: Tensor, inputs: Inputs) -> Tensor:
        """scores_MK of slots, float32."""
        row_queries_MHE, col_queries_MHE, row_keys_HNE, col_keys_HNE = (operand.float() for operand in inputs)
        row_MK = (row_queries_MHE * row_keys_HNE[0][slots_MK // self._shape.sub_keys]).sum(-1)
        col_MK = (col_queries_MHE * col_keys_HNE[0][slots_MK % self._shape.sub_keys]).sum(-1)
        return (row_MK + col_MK) * self._shape.tau
