"""Sparse-Gather forward: ours, FBGEMM's TBE, torch's embedding_bag, and torch.compile of the gather and weighted sum.

TBE reads a float16 copy of the table, and writes float32 or float16.  The floor is the time of a large sum that reads
as many bytes as the rows of all hits have, each read once.

Shape suffixes: R = n rows of a table, D its width, G bags, L hits of a bag, H hits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from benchmarks.kernel_tables import Hits, make_hits, make_table, make_tbe
from benchmarks.kernel_timing import OURS, Bench, Call, Case, release
from msn_dist.kernels import reference

ROWS = 2**24
DIMS, QUICK_DIMS = (64, 128, 256, 1024), (64, 128)
BAGS, QUICK_BAGS = ((32768, 32), (8192, 128)), ((32768, 32),)  # bags and hits of each
SLOTS = ("uniform", "zipf")
_SETS = 3  # of hits
# of the largest sum: float32 sums in any order, and results rounded to 11 or 8 bits
_EXACT, _FLOAT16, _BF16 = 1e-5, 2**-10, 2**-7


def run(bench: Bench, quick: bool) -> None:
    """All providers at all shapes."""
    for dim in QUICK_DIMS if quick else DIMS:
        values_RD = make_table(ROWS, dim, torch.bfloat16)
        for bags, hits in QUICK_BAGS if quick else BAGS:
            for slots in SLOTS:
                sets = [make_hits(slots, ROWS, bags, hits, seed) for seed in range(_SETS)]
                compare(bench, values_RD, sets, slots, compiled=hits == 32 and slots == "uniform")
        del values_RD
        release()


def compare(bench: Bench, values_RD: Tensor, sets: Sequence[Hits], slots: str, compiled: bool) -> None:
    (bags, hits), dim = sets[0].rows_GL.shape, values_RD.shape[1]
    rows_bytes = bags * hits * dim * values_RD.element_size()
    where = {"dtype": "bf16", "slots": slots, "n": len(values_RD), "bags": bags, "hits": hits, "dim": dim}
    case = Case("sparse gather", "forward", where, rows_bytes + bags * (hits * 12 + dim * 4))
    pooled_GD = truth(values_RD, sets[0])
    check = partial(problem, pooled_GD)

    bench.run(case, OURS, partial(_ours, values_RD, sets), partial(check, error=_EXACT), _SETS)
    narrow = partial(_ours, values_RD, [Hits(h.rows_GL.int(), h.weights_GL) for h in sets], torch.bfloat16)
    bench.run(case, f"{OURS}, int32, output bf16", narrow, partial(check, error=_BF16), _SETS)
    for name, out_dtype, error in (("float32", torch.float32, _EXACT), ("float16", torch.float16, _FLOAT16)):
        make = partial(_tbe, values_RD, sets, out_dtype)
        bench.run(case, f"TBE fp16, output {name}", make, partial(check, error=error), _SETS)
        release()
    bench.run(case, "embedding_bag", partial(_embedding_bag, values_RD, sets), partial(check, error=_BF16), _SETS)
    if compiled:
        bench.run(case, "compile", partial(_compiled, values_RD, sets), partial(check, error=_EXACT), _SETS)
    floor = rows_bytes / bench.peaks.read * 1e3
    bench.add_times(case, "rows read once (floor)", (floor,) * 3)


def truth(values_RD: Tensor, hits: Hits) -> Tensor:
    """pooled_GD, float32, from the reference and the rows that are hit."""
    rows_H = hits.rows_GL.flatten()
    read_HD = values_RD[rows_H].float()
    return reference.weighted_bags(
        read_HD, torch.arange(len(rows_H), device=rows_H.device), hits.offsets_G1(), hits.weights_GL.flatten()
    )


def problem(want: Tensor, got: Tensor, error: float) -> str | None:
    """What is wrong with a result that may be off by `error` of the largest value, or None."""
    if got.shape != want.shape:
        return f"the shape is {tuple(got.shape)} and not {tuple(want.shape)}"
    off = ((got.float() - want).abs().max() / want.abs().max()).item()
    return None if off <= error else f"off by {off:.3g} of the largest value"


def _ours(values_RD: Tensor, sets: Sequence[Hits], out_dtype: torch.dtype = torch.float32) -> Call:
    from msn_dist.kernels.sparse_gather import sparse_gather

    return lambda i: sparse_gather(values_RD, sets[i].rows_GL, sets[i].weights_GL, out_dtype=out_dtype)


def _tbe(values_RD: Tensor, sets: Sequence[Hits], out_dtype: torch.dtype) -> Call:
    tbe = make_tbe(values_RD, torch.float16, out_dtype, lr=0.0, eps=1e-8)
    flat = [(hits.rows_GL.flatten(), hits.offsets_G1(), hits.weights_GL.flatten()) for hits in sets]

    def read(i: int) -> Tensor:
        with torch.no_grad():
            return tbe.read(*flat[i])

    return read


def _embedding_bag(values_RD: Tensor, sets: Sequence[Hits]) -> Call:
    weights = [hits.weights_GL.to(values_RD.dtype) for hits in sets]  # which it asks for
    return lambda i: embedding_bag(sets[i].rows_GL, values_RD, mode="sum", per_sample_weights=weights[i])


def _compiled(values_RD: Tensor, sets: Sequence[Hits]) -> Call:
    """Summed in float32: Inductor makes one kernel of it, where an einsum would write the rows first."""
    torch.compiler.reset()

    @torch.compile(dynamic=False)
    def gather(rows_GL: Tensor, weights_GL: Tensor) -> Tensor:
        return (values_RD[rows_GL].float() * weights_GL[:, :, None]).sum(dim=1)

    return lambda i: gather(sets[i].rows_GL, sets[i].weights_GL)
