"""First step of the retrieval: of the N scores of a query on one axis, the few that can be among its k best.

The scores never leave the registers.  They are computed twice, as the matrix units are by far the cheapest part:

    first time   column c joins group c mod G, and every group keeps its maximum: one instruction a score.  The k-th
                 largest of the G maxima is a bound that at least k scores reach; bisection comes close to it from
                 below.
    second time  the scores that reach the bound are written out: -G ln(1 - k / G) of them if columns fall into
                 groups by chance, which is 37 for k = 32 and G = 128, whatever N is.

A query that has more survivors than fit (many equal scores, or best columns that share their groups) is counted as
such, and `axis_topk` does it again the slow way: the result is exact always.

Shape suffixes: M queries, H heads, N sub-keys of an axis, E key width, C capacity, A = 2 * H (axis, head) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from msn_dist.kernels.sizes import survivors_of
from msn_dist.kernels.support import interpreted


@dataclass(frozen=True)
class Survivors:
    """Unordered candidates: the first min(count, C) of candidates_CAM are a float32 score (upper half) and a column."""

    candidates_CAM: Tensor  # int64; M is padded to whole blocks of queries
    count_AM: Tensor  # int32; more than C: not all of them are there


@dataclass(frozen=True)
class Shape:
    """How the kernel is launched."""

    queries: int  # of a block
    warps: int
    stages: int
    registers: int  # of a thread, at most


def shape_for(key_bytes: int, groups: int) -> Shape:
    """The launch for sub-keys of that many bytes, padding included."""
    if key_bytes <= 256 and groups == 128:
        return Shape(queries=64, warps=4, stages=3, registers=128)  # 4 blocks fit a multiprocessor
    stages = 2 if key_bytes * groups <= 2**16 else 1  # of so many bytes each, in shared memory
    return Shape(queries=64, warps=4 if groups == 128 else 8, stages=stages, registers=240)


def survivors(
    queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], k: int, shape: Shape | None = None
) -> Survivors:
    """Candidates for the k best columns: queries_MHE and keys_HNE of the row axis and of the column axis."""
    count, heads, width = queries[0].shape
    sub_keys = keys[0].shape[1]
    groups = max(128, survivors_of(k))
    padded_width = max(16, triton.next_power_of_2(width))
    shape = shape or shape_for(padded_width * queries[0].element_size(), groups)
    padded = triton.cdiv(count, shape.queries) * shape.queries
    device = queries[0].device
    found = Survivors(
        torch.empty(survivors_of(k) + 8, 2 * heads, padded, dtype=torch.int64, device=device),
        torch.empty(2 * heads, padded, dtype=torch.int32, device=device),
    )
    _survivors_kernel[(padded // shape.queries, 2 * heads)](
        *queries,
        *keys,
        found.candidates_CAM,
        found.count_AM,
        count,
        sub_keys,
        heads,
        k,
        found.count_AM.numel(),
        bisections=8,
        even=sub_keys % groups == 0,
        width=width,
        piece=min(padded_width, 256 if queries[0].element_size() == 2 else 64),
        pieces=triton.cdiv(padded_width, 256 if queries[0].element_size() == 2 else 64),
        capacity=survivors_of(k),
        groups=groups,
        block_queries=shape.queries,
        precision="tf32x3" if queries[0].dtype == torch.float32 else "ieee",
        scalar=interpreted(),
        num_warps=shape.warps,
        num_stages=shape.stages,
        **({} if interpreted() else {"maxnreg": shape.registers}),
    )
    return found


def _put_asm(pack: int) -> tuple[str, str]:
    """PTX for `pack` scores: those whose `bit` is in `word` are stored as (column, score).

    A score's address is `before` + its own place among those of its thread, a nibble of `inclusive`, times `stride`
    bytes.  Triton's own masked store would move the scores to another layout through shared memory; and all of this is
    skipped where no thread of a warp has a score to store.
    """
    p = range(pack)
    score, word, bit, inclusive, shift, column, before, stride = (range(pack * j, pack * (j + 1)) for j in range(1, 9))
    lines = [
        f".reg .pred reached<{pack}>, any;",
        f".reg .b32 place<{pack}>, own<{pack}>, some;",
        f".reg .b64 at<{pack}>;",
        *(f"mov.b32 ${i}, 0;" for i in p),
        f"mov.b32 some, ${word[0]};",
        *(f"or.b32 some, some, ${word[i]};" for i in p[1:]),
        "setp.ne.b32 any, some, 0;",
        "@!any bra done;",
        *(f"and.b32 own{i}, ${word[i]}, ${bit[i]};" for i in p),
        *(f"setp.ne.b32 reached{i}, own{i}, 0;" for i in p),
        *(f"shr.u32 place{i}, ${inclusive[i]}, ${shift[i]};" for i in p),
        *(f"and.b32 place{i}, place{i}, 15;" for i in p),
        *(f"mad.wide.u32 at{i}, place{i}, ${stride[i]}, ${before[i]};" for i in p),
        *(f"@reached{i} st.global.v2.b32 [at{i}], {{${column[i]}, ${score[i]}}};" for i in p),
        "done:",
    ]
    operands = ["=r", "f", "r", "r", "r", "r", "r", "l", "r"]
    return "\n".join(["{", *lines, "}"]), ",".join(operand for operand in operands for _ in p)


# A thread holds 16 scores of a query in a chunk of 64 columns, as the matrix units lay them out: two integers of 8
# nibbles count them.
_COLUMNS = tl.constexpr(64)
_PACK = tl.constexpr(8)
_PUT, _PUT_OPERANDS = map(tl.constexpr, _put_asm(_PACK.value))


@triton.jit
def _survivors_kernel(
    row_queries,
    col_queries,
    row_keys,
    col_keys,
    candidates,
    counts,
    count,
    sub_keys,
    heads,
    k,
    stride,
    bisections,
    even: tl.constexpr,
    width: tl.constexpr,
    piece: tl.constexpr,
    pieces: tl.constexpr,
    capacity: tl.constexpr,
    groups: tl.constexpr,
    block_queries: tl.constexpr,
    precision: tl.constexpr,
    scalar: tl.constexpr,
):
    axis = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    m = tl.program_id(0) * block_queries + tl.arange(0, block_queries)
    queries = tl.where(axis == 0, row_queries, col_queries) + (m.to(tl.int64) * heads + head)[:, None] * width
    keys = tl.where(axis == 0, row_keys, col_keys) + head.to(tl.int64) * sub_keys * width
    exists = (m < count)[:, None]
    query = _query(queries, 0, exists, width, piece)

    half: tl.constexpr = groups // 2
    g = tl.arange(0, half)
    best_0 = tl.full([block_queries, half], float("-inf"), tl.float32)
    best_1 = tl.full([block_queries, half], float("-inf"), tl.float32)
    for start in range(0, sub_keys, groups):
        scores = _scores(
            query, queries, exists, keys, start + g, sub_keys, even, width, piece, pieces, precision, scalar
        )
        best_0 = tl.maximum(best_0, scores)
        scores = _scores(
            query, queries, exists, keys, start + half + g, sub_keys, even, width, piece, pieces, precision, scalar
        )
        best_1 = tl.maximum(best_1, scores)

    low = tl.minimum(
        tl.min(tl.where((g < sub_keys)[None, :], best_0, float("inf")), 1),
        tl.min(tl.where((half + g < sub_keys)[None, :], best_1, float("inf")), 1),
    )
    high = tl.maximum(tl.max(best_0, 1), tl.max(best_1, 1))
    for _ in range(bisections):
        middle = 0.5 * (low + high)
        reached = (best_0 >= middle[:, None]).to(tl.int32) + (best_1 >= middle[:, None]).to(tl.int32)
        enough = tl.sum(reached, 1) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    low = tl.where(m < count, low, float("inf"))

    row = tl.program_id(1) * (tl.num_programs(0) * block_queries) + m
    first = candidates + row
    c = tl.arange(0, _COLUMNS)
    found = tl.zeros([block_queries], tl.int32)
    for start in range(0, sub_keys, _COLUMNS):
        scores = _scores(
            query, queries, exists, keys, start + c, sub_keys, even, width, piece, pieces, precision, scalar
        )
        found = _put(scores, low, start + c, found, first, stride, capacity, block_queries, scalar)
    tl.store(counts + row, found)


@triton.jit
def _query(queries, start: tl.constexpr, exists, width: tl.constexpr, piece: tl.constexpr):
    e = start + tl.arange(0, piece)
    query = tl.load(queries + e[None, :], mask=exists & (e < width)[None, :], other=0.0)
    # what comes out of arithmetic stays in registers, where the matrix units read it faster than from shared memory
    return tl.where(exists, query, 0.0)


@triton.jit
def _scores(
    query,
    queries,
    exists,
    keys,
    columns,
    sub_keys,
    even: tl.constexpr,
    width: tl.constexpr,
    piece: tl.constexpr,
    pieces: tl.constexpr,
    precision: tl.constexpr,
    scalar: tl.constexpr,
):
    """scores [queries, columns], float32; -inf in columns beyond the last one."""
    scores = _product(query, keys, columns, sub_keys, 0, even, width, piece, precision, scalar)
    for i in tl.static_range(1, pieces):
        part = _query(queries, i * piece, exists, width, piece)
        scores += _product(part, keys, columns, sub_keys, i * piece, even, width, piece, precision, scalar)
    if not even:
        scores = tl.where((columns < sub_keys)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _product(
    query,
    keys,
    columns,
    sub_keys,
    start: tl.constexpr,
    even: tl.constexpr,
    width: tl.constexpr,
    piece: tl.constexpr,
    precision: tl.constexpr,
    scalar: tl.constexpr,
):
    e = start + tl.arange(0, piece)
    at = keys + columns[:, None] * width + e[None, :]
    if even and start + piece <= width:
        key = tl.load(at)
    else:
        key = tl.load(at, mask=(columns < sub_keys)[:, None] & (e < width)[None, :], other=0.0)
    if scalar:
        query, key = query.to(tl.float32), key.to(tl.float32)  # the interpreter's product of bfloat16 is wrong
    return tl.dot(query, tl.trans(key), input_precision=precision)


@triton.jit
def _put(
    scores, bound, columns, found, first, stride, capacity: tl.constexpr, queries: tl.constexpr, scalar: tl.constexpr
):
    """Append the scores that reach the bound of their query, or are NaN, to its candidates; returns their number.

    Column 32 i + 8 j + 2 t + r belongs to thread t of the four that share a query.  Its places in half i of the chunk
    are the nibbles of one product, and those of the threads before it the bytes of another.
    """
    parts: tl.constexpr = [queries, 2, 4, 4, 2]
    reached = tl.reshape(~(scores < bound[:, None]), parts)
    nibble = 8 * tl.arange(0, 4)[None, None, :, None, None] + 4 * tl.arange(0, 2)[None, None, None, None, :]
    word = tl.sum(tl.sum(tl.where(reached, 1 << nibble, 0), 4), 2)
    inclusive = word * 0x11111111
    byte = 8 * tl.arange(0, 4)[None, None, :]
    of_threads = tl.sum(((inclusive >> 28) & 15) << byte, 2)
    of_half = ((of_threads * 0x01010101) >> 24) & 255
    before_half = found[:, None] + tl.where(tl.arange(0, 2)[None, :] == 0, 0, (tl.sum(of_half, 1)[:, None] - of_half))
    before = before_half[:, :, None] + (((of_threads * 0x01010100)[:, :, None] >> byte) & 255)
    before = tl.minimum(before, capacity) - 1  # what does not fit goes into the last places

    first = first[:, None, None] + before.to(tl.int64) * stride
    first = tl.reshape(tl.broadcast_to(first[:, :, None, :, None], parts), scores.shape)
    word = tl.reshape(tl.broadcast_to(word[:, :, None, :, None], parts), scores.shape)
    inclusive = tl.reshape(tl.broadcast_to(inclusive[:, :, None, :, None], parts), scores.shape)
    nibble = tl.reshape(tl.broadcast_to(nibble, parts), scores.shape)
    if scalar:
        entry = (scores.to(tl.int32, bitcast=True).to(tl.int64) << 32) | columns[None, :]
        tl.store(first + ((inclusive >> nibble) & 15) * stride, entry, mask=((word >> nibble) & 1) == 1)
    else:
        tl.inline_asm_elementwise(
            _PUT,
            _PUT_OPERANDS,
            [scores, word, 1 << nibble, inclusive, nibble, columns[None, :], first.to(tl.uint64), stride * 8],
            dtype=tl.int32,
            is_pure=False,
            pack=_PACK,
        )
    return found + tl.sum(of_half, 1)
