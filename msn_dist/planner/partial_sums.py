"""Scratch of torch's sums on a GPU, which can be many times what they read."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from msn_dist.kernels.sizes import ceil_div

_MULTIPROCESSORS, _THREADS = 132, 2048  # of an H100 or H200, and of a multiprocessor; an A100 has 108
_WARP, _BLOCK = 32, 512  # threads
_LEAST, _MOST = 16, 256  # values that a thread adds up


def partial_sums_bytes(x: Tensor, dims: Sequence[int]) -> int:
    """Bytes that `x.sum(dims)` takes beside its result, as torch 2.11 to 2.13 choose them (ATen, cuda/Reduce.cuh).

    Where a column is longer than the threads of a block should add up, several blocks share it, and leave their parts
    in memory: one a block and output, times the outputs of a whole row of threads, although a block has but these.  The
    gradient of a bias is such a sum over the batch: of [8192, 2048] in float32, 64 MiB, it takes 128.  Sums along the
    dimension that lies together in memory are done by a row of threads and take next to nothing; 0 here.

    Tensors of 2 GiB and more are summed in pieces, which take less than this.
    """
    reduced = {dim % x.ndim for dim in dims} if dims else set(range(x.ndim))
    real = sorted((dim for dim in range(x.ndim) if x.shape[dim] > 1), key=x.stride)
    if not real or real[0] in reduced:
        return 0
    kept = [dim for dim in real if dim not in reduced]
    outputs = prod(x.shape[dim] for dim in kept)
    inputs = x.numel() // outputs
    at_once = _outputs_at_once(x, kept, [dim for dim in real if dim in reduced])
    threads, most_wide = _BLOCK // at_once, _power_of_two_within(outputs // at_once)
    height = min(_power_of_two_within(inputs), threads // min(most_wide, _WARP))
    width = min(most_wide, threads // height)
    values, blocks = ceil_div(inputs, height), ceil_div(outputs // at_once, width)
    most_blocks = _MULTIPROCESSORS * (_THREADS // (width * height))
    if inputs < min(_LEAST * height, _MOST) or values < _MOST or blocks > most_blocks:
        return 0
    sharing = max(min(ceil_div(most_blocks, blocks), ceil_div(values, _LEAST)), ceil_div(values, _MOST))
    if sharing == 1:
        return 0
    return max(4, x.element_size()) * outputs * sharing * width * at_once  # sums of narrower numbers are float32


def _outputs_at_once(x: Tensor, kept: Sequence[int], reduced: Sequence[int]) -> int:
    """Neighbouring outputs of one thread: 4 or 2 where they fill all rows evenly.

    `kept` and `reduced`: dimensions from the fastest on; those that lie one in the other count as one.
    """
    first, *rest = kept
    if x.stride(first) != 1:
        return 1
    row = x.shape[first]
    while rest and x.stride(rest[0]) == row:
        row *= x.shape[rest.pop(0)]
    sizes = [row, *(x.stride(dim) for dim in (*rest, *reduced))]
    return next(count for count in (4, 2, 1) if not any(size % count for size in sizes))


def _power_of_two_within(number: int) -> int:
    """The largest one that is not above, up to a block's threads."""
    return min(1 << max(0, number.bit_length() - 1), _BLOCK)
