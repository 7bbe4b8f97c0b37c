"""Hits sorted by the rank that owns their row, in two kernels and without a word to the host.

    count   owners of a block of B hits: how many of each owner (a histogram), hits of every bag on each owner
    cumsum  over (owner, block), in torch: where the hits that a block has for an owner begin
    place   the rank of each hit among those of its owner in the block, then the scatter

The rank comes from a prefix sum over the one-hot owners [B, W] where these are few, else from a comparison of all hits
of a smaller block [B, B], whose cost does not grow with W.  The order is stable: the hits of a bag stay together.

Shape suffixes: M bags, L hits a bag, H hits = M * L, W ranks, B hits of a block, K blocks, X = W * K counts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_RANKS = 1024
_FEW = 31  # owners up to which the prefix sum is cheaper


def bucket_hits(row_ML: Tensor, block: int, world: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order_H, row_H, lengths_WM) of hits whose rows lie in blocks of `block`, rank after rank.

    Args:
        row_ML: int32 or int64 in [0, block * world), not checked, as that would wait for the device.
        block: rows of a rank.
        world: W, at most 1,024.

    Returns:
        order_H: int64, place in the flattened [M, L] of the hit that comes h-th, by owner and then by place.
        row_H: its row, local to the owner; int32 for blocks below 2^31 rows, else int64.
        lengths_WM: int64, hits of bag m on owner w.

    Raises ValueError for other shapes and dtypes.
    """
    _check(row_ML, block, world)
    bags, per_bag = row_ML.shape
    hits, device = row_ML.numel(), row_ML.device
    row_dtype = torch.int32 if block < 2**31 else torch.int64
    if world == 1:
        lengths_WM = torch.full((1, bags), per_bag, dtype=torch.int64, device=device)
        return torch.arange(hits, device=device), row_ML.flatten().to(row_dtype), lengths_WM
    order_H = torch.empty(hits, dtype=torch.int64, device=device)
    row_H = torch.empty(hits, dtype=row_dtype, device=device)
    lengths_WM = torch.zeros(world, bags, dtype=torch.int64, device=device)
    if hits == 0:
        return order_H, row_H, lengths_WM
    few = world <= _FEW
    size = 512 if few else 128
    blocks = triton.cdiv(hits, size)
    counts_X = torch.empty(world * blocks + 1, dtype=torch.int32, device=device)  # one 0, then the counts
    shape = {
        "WORLD": world,
        "OWNERS": triton.next_power_of_2(world + 1),  # and one for lanes without a hit
        "BLOCK": size,
        "NARROW": block * world < 2**31,
    }
    row_ML = row_ML.contiguous()
    count_owners_kernel[(blocks,)](row_ML, counts_X, lengths_WM, hits, per_bag, block, **shape)
    before_X = counts_X.cumsum(0, dtype=torch.int32)
    place_hits_kernel[(blocks,)](row_ML, before_X, order_H, row_H, hits, block, **shape, FEW=few)
    return order_H, row_H, lengths_WM


def _check(row_ML: Tensor, block: int, world: int) -> None:
    if row_ML.dim() != 2 or row_ML.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"rows of shape {list(row_ML.shape)} and {row_ML.dtype}: hits are int32 or int64 of shape [bags, hits]"
        )
    if not 1 <= world <= MOST_RANKS:
        raise ValueError(f"{world} ranks: bucketing is for 1 to {MOST_RANKS:,}; sort them by torch")
    if block < 1:
        raise ValueError(f"blocks of {block} rows: a rank holds at least one")
    if row_ML.numel() >= 2**31:
        raise ValueError(f"{row_ML.numel()} hits: at most 2**31 - 1 are sorted at once; use more memory.chunks")


@triton.jit
def _owners(row_ptr, hit_B, hits, block, WORLD: tl.constexpr, NARROW: tl.constexpr):
    """Owner of each hit, int32; WORLD for lanes beyond the last hit."""
    row_B = tl.load(row_ptr + hit_B, mask=hit_B < hits, other=0)
    if NARROW:  # a division of 32 bits takes a fifth of the time
        row_B = row_B.to(tl.int32)
    return tl.where(hit_B < hits, (row_B // block).to(tl.int32), WORLD)


@triton.jit
def count_owners_kernel(
    row_ptr, counts_ptr, lengths_ptr, hits, per_bag, block,
    WORLD: tl.constexpr, OWNERS: tl.constexpr, BLOCK: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """counts_X of a block of hits, and its part of lengths_WM."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    # int64: the last block may end beyond 2^31
    hit_B = part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    owner_B = _owners(row_ptr, hit_B, hits, block, WORLD, NARROW)
    bag_B = hit_B.to(tl.int32) // per_bag
    bags = hits // per_bag
    tl.atomic_add(lengths_ptr + owner_B.to(tl.int64) * bags + bag_B, 1, mask=hit_B < hits, sem="relaxed")

    owner_W = tl.arange(0, OWNERS)
    place_W = owner_W.to(tl.int64) * parts + part
    tl.store(counts_ptr + 1 + place_W, tl.histogram(owner_B, OWNERS), mask=owner_W < WORLD)
    if part == 0:
        tl.store(counts_ptr, 0)


@triton.jit
def place_hits_kernel(
    row_ptr, before_ptr, order_ptr, local_ptr, hits, block,
    WORLD: tl.constexpr, OWNERS: tl.constexpr, BLOCK: tl.constexpr, NARROW: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Every hit of a block to its place: its number into order_H, its local row into row_H."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    lane_B = tl.arange(0, BLOCK)
    hit_B = part.to(tl.int64) * BLOCK + lane_B
    owner_B = _owners(row_ptr, hit_B, hits, block, WORLD, NARROW)
    if FEW:
        mine_BW = owner_B[:, None] == tl.arange(0, OWNERS)[None, :]
        rank_B = tl.sum(tl.where(mine_BW, tl.cumsum(mine_BW.to(tl.int32), 0), 0), 1) - 1
    else:
        before_BB = (owner_B[:, None] == owner_B[None, :]) & (lane_B[:, None] > lane_B[None, :])
        rank_B = tl.sum(before_BB.to(tl.int32), 1)
    valid_B = hit_B < hits
    target_B = tl.load(before_ptr + owner_B.to(tl.int64) * parts + part, mask=valid_B, other=0) + rank_B
    row_B = tl.load(row_ptr + hit_B, mask=valid_B, other=0)
    local_B = row_B - owner_B.to(tl.int64) * block
    tl.store(order_ptr + target_B, hit_B, mask=valid_B)
    tl.store(local_ptr + target_B, local_B.to(local_ptr.dtype.element_ty), mask=valid_B)
