"""Sizes that the kernels' launches and scratch follow from.  No Triton here: who plans a step needs none.

Shape suffixes: M queries, H heads, N sub-keys of an axis, E key width of one half.
"""

from __future__ import annotations

import torch

# of a retrieval
MAX_K = 128
MAX_SUB_KEYS = 65_536
MAX_KEY_DIM = 256
RETRIEVED_AT_ONCE = 131_072  # (query, head) pairs: bounds the scratch to about 1.6 KiB for each at k = 32

# of its backward without a sort
COMPARED_SUB_KEYS = 256
COMPARED_SUMS = 2**14  # of a program: N * E, padded, that its registers hold; half as many where operands are tf32
COMPARING_PROGRAMS = 256  # about two for each multiprocessor of an H200; a constant, so that sums depend on no device

# of a look-up
MAX_WIDTH = 4096  # of values

# of the LayerNorm of queries
NORM_WIDTH = 256
NORM_ELEMENTS = 2048  # of a block: 16 a thread
NORM_PROGRAMS = 256  # of the backward at most, an axis; a constant as above

# of sums over sorted hits
CHUNK = 32  # hits
GROUP = 2048  # hits
VARYING_ROWS = 2**31  # stands for a number of rows that changes each step, as kernels compiled must not change with it


def why_no_retrieval(top_k: int, sub_keys: int, key_dim: int) -> str | None:
    """What of a retrieval is larger than the kernels take, as a clause, or None."""
    limits = {"top_k": (top_k, MAX_K), "sub_keys": (sub_keys, MAX_SUB_KEYS), "key_dim": (key_dim, MAX_KEY_DIM)}
    for name, (value, limit) in limits.items():
        if value > limit:
            return f"the kernels take {name} up to {limit}, and it is {value}"
    return None


def why_no_lookup(width: int) -> str | None:
    """The same of values of this width."""
    return f"the kernels take values up to {MAX_WIDTH} wide, and these are {width}" if width > MAX_WIDTH else None


def ceil_div(number: int, size: int) -> int:
    return -(-number // size)


def power_of_two(number: int) -> int:
    """The least one that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


def survivors_of(k: int) -> int:
    """For how many candidates of a query and axis there is room, for k hits."""
    return max(16, 2 * power_of_two(k))


def compares(sub_keys: int, width: int, dtype: torch.dtype) -> bool:
    """Whether all sub-keys of a head and their sums fit into a program of the backward that does not sort."""
    most = COMPARED_SUMS if dtype == torch.bfloat16 else COMPARED_SUMS // 2
    return sub_keys <= COMPARED_SUB_KEYS and max(16, power_of_two(sub_keys)) * max(16, power_of_two(width)) <= most


def compared_queries(dtype: torch.dtype) -> int:
    """Queries of a block of that backward."""
    return 32 if dtype == torch.bfloat16 else 16


def compared_splits(queries: int, heads: int, block: int, programs: int = COMPARING_PROGRAMS) -> tuple[int, int]:
    """(blocks of a program, programs of an axis and head) of that backward."""
    blocks = ceil_div(queries, block)
    each = max(1, ceil_div(blocks, max(1, programs // (2 * heads))))
    return each, ceil_div(blocks, each)


def norm_programs(shape_MHE: tuple[int, ...]) -> int:
    """Programs of an axis in the LayerNorm's backward."""
    queries, heads, width = shape_MHE
    return min(NORM_PROGRAMS, ceil_div(queries * heads, NORM_ELEMENTS // power_of_two(width)))


def key_dtype(rows: int) -> torch.dtype:
    """Of row numbers that are sorted: the fewer bytes, the faster."""
    return torch.int16 if rows <= 2**15 else torch.int32 if rows <= 2**31 else torch.int64


def sorted_bytes(hits: int, rows: int, width: int) -> int:
    """Most scratch of `segments.segments_of`: of the sort, or of sorted hits and their partial sums.

    The sort has keys and places twice, and radix sort takes as much again.
    """
    key = key_dtype(rows).itemsize
    sorted_key = 2 if rows <= 2**16 else key
    return hits * (key + 8) + max(2 * hits * (sorted_key + 8), 4 * width * (hits // CHUNK + hits // GROUP))
