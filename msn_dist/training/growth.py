"""A larger memory from a smaller one: a checkpoint with N sub-keys an axis becomes one with N' of them.

An old sub-key keeps its index, so old slot (I, J) becomes slot I * N' + J, with the value and optimizer state it had.
New sub-key I' starts close to an old one, its parent I' mod N, and new slot (I', J') as a copy of slot (I' mod N,
J' mod N).  So a query finds what it found before, but in several copies, which drift apart as training goes on.  If the
copies were exact, (N' / N)^2 times the top_k would give the same output; with fewer, a query reads fewer old slots.

No model is built.  Tables are read by blocks of rows, whatever strategy and world size wrote them, and each row is sent
to the ranks that will write it and its copies; the rest is copied as it is.

Shape suffixes: A = 2 axes, H heads, N sub-keys an axis, E key width, R rows on this rank, C rows of a chunk, S those to
be sent, W ranks; X stands for the columns of a table, or for nothing.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.tensor as dtensor
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from msn_dist.config import MemoryConfig
from msn_dist.errors import InputError
from msn_dist.memory import Placement
from msn_dist.training.checkpoint import read, tensors_in, write
from msn_dist.training.ranks import Ranks

NOISE = 0.1  # tells copies apart, and hardly changes what is found
_CHUNK = 2**22  # numbers that a rank sends at once, and as many for each copy


def grow(
    checkpoint: Path,
    target: Path,
    memory: MemoryConfig,
    sub_keys: int,
    ranks: Ranks,
    *,
    seed: int = 0,
    noise: float = NOISE,
) -> None:
    """Write to `target` what `checkpoint` holds, with `sub_keys` sub-keys an axis in every memory; a collective call.

    `memory` is the configuration of the checkpoint's memories.  `noise` is the root mean square of what sets a new
    sub-key apart from its parent, over that of the parent.  Each rank holds its share of the old and of the new tables
    on the CPU.  InputError if the memory would not be larger, or the checkpoint cannot be read.
    """
    if sub_keys <= memory.sub_keys:
        raise InputError(f"memory.sub_keys={sub_keys}: a memory with {memory.sub_keys} can only grow; choose more")
    mesh = DeviceMesh.from_group(ranks.control, "cpu")
    stored = tensors_in(checkpoint, ranks)
    shapes = grown_shapes({name: tensor.size for name, tensor in stored.items()}, memory, sub_keys)
    part_of = _memory_parts(shapes, memory)
    old: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if part_of.get(name) in ("codes", "theta") or not tensor.size:
            old[name] = torch.empty(tensor.size, dtype=tensor.properties.dtype)
        else:
            dtype = tensor.properties.dtype
            old[name] = dtensor.empty(tensor.size, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
    read(checkpoint, old, ranks)

    generator = torch.Generator().manual_seed(seed)
    new: dict[str, Tensor] = {}
    for name in sorted(old):  # one order, so that every rank draws the same noise
        match part_of.get(name), name.startswith("model."):
            case "values", _:
                new[name] = _spread(old[name], shapes[name], memory.sub_keys, sub_keys, ranks)
            case "codes", True:
                theta = name.replace("codes_AHNE", "theta")
                keys_AHNE = old[theta] @ old[name] if part_of.get(theta) == "theta" else old[name]
                new[name] = _with_children(old[name], keys_AHNE, sub_keys, noise, generator)
            case "theta", True:  # new sub-keys mix with nothing
                new[name] = _padded(old[name], shapes[name])
                new[name].diagonal(dim1=2, dim2=3)[..., memory.sub_keys :] = 1
            case "codes" | "theta", False:  # AdamW's moments
                new[name] = _padded(old[name], shapes[name])
            case _:
                new[name] = old[name]
    write(target, new, ranks)


def grown_shapes(shapes: Mapping[str, torch.Size], memory: MemoryConfig, sub_keys: int) -> dict[str, torch.Size]:
    """The shapes of a checkpoint's tensors after `grow`."""
    grown = dict(shapes)
    for name, part in _memory_parts(shapes, memory).items():
        shape = shapes[name]
        match part:
            case "codes":
                grown[name] = torch.Size([*shape[:2], sub_keys, shape[3]])
            case "theta":
                grown[name] = torch.Size([*shape[:2], sub_keys, sub_keys])
            case "values":  # one table for all groups of tokens
                grown[name] = torch.Size([shape[0] // memory.sub_keys**2 * sub_keys**2, *shape[1:]])
    return grown


def _memory_parts(shapes: Mapping[str, torch.Size], memory: MemoryConfig) -> dict[str, str]:
    """Which tensors grow, the optimizers' included: "codes", "theta" (if it mixes sub-keys) or "values" by name."""
    memories = [match[1] for name in shapes if (match := re.fullmatch(r"model\.(.+)\.keys\.codes_AHNE", name))]
    theta = "theta" if memory.theta == "mix" else "(?!)"
    pattern = re.compile(
        rf"(?:model|\w+_optimizer\.state)\.(?:{'|'.join(map(re.escape, memories))})\."
        rf"(?:(?P<values>values\.weight)|keys\.(?:(?P<codes>codes_AHNE)|(?P<theta>{theta})))(?:\..+)?"
    )
    matches = {name: pattern.fullmatch(name) for name, shape in shapes.items() if shape}  # AdamW's step has no shape
    return {name: match.lastgroup for name, match in matches.items() if match}


def _with_children(
    codes_AHNE: Tensor, keys_AHNE: Tensor, sub_keys: int, noise: float, generator: torch.Generator
) -> Tensor:
    """The codes, and new ones: those of the parents' keys and noise."""
    old = codes_AHNE.shape[2]
    children_AHNE = keys_AHNE[:, :, torch.arange(old, sub_keys) % old]
    scale_AHN1 = children_AHNE.square().mean(-1, keepdim=True).sqrt()
    noise_AHNE = torch.randn(children_AHNE.shape, generator=generator, dtype=codes_AHNE.dtype)
    return torch.cat([codes_AHNE, children_AHNE + noise * scale_AHN1 * noise_AHNE], dim=2)


def _padded(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The tensor in the lowest corner of one of zeros."""
    padded = tensor.new_zeros(shape)
    padded[tuple(map(slice, tensor.shape))] = tensor
    return padded


def _spread(table: DTensor, shape: torch.Size, old: int, new: int, ranks: Ranks) -> DTensor:
    """The rows of a table for `old` sub-keys an axis, and copies of them, in the places of one for `new`.

    Both tables lie in blocks of ceil(rows / W), DTensor's own layout.
    """
    rows_RX = table.to_local()
    block, new_block = (-(-rows // ranks.world) for rows in (table.shape[0], shape[0]))
    new_first = ranks.rank * new_block
    new_rows_RX = rows_RX.new_empty(max(0, min(new_block, shape[0] - new_first)), *shape[1:])
    placement, new_placement = Placement.permuted(table.shape[0]), Placement.permuted(shape[0])
    chunk = max(1, _CHUNK // math.prod(shape[1:]))
    shifts = range(0, new, old)
    for start in range(0, block, chunk):  # as often on every rank
        rows_CX = rows_RX[start : start + chunk]
        row_C = torch.arange(len(rows_CX)) + (ranks.rank * block + start)
        pair_C, sub_key_C = placement.slot_of(row_C) // old, placement.slot_of(row_C) % old
        group_C, first_C = pair_C // old, pair_C % old
        for down, right in itertools.product(shifts, shifts):
            inside_C = (first_C + down < new) & (sub_key_C + right < new)
            slot_C = (group_C * new + first_C + down) * new + sub_key_C + right
            row_S = new_placement.row_of(slot_C[inside_C])
            arrived_row, arrived_X = _to_owners((row_S, rows_CX[inside_C]), row_S // new_block, ranks)
            new_rows_RX[arrived_row - new_first] = arrived_X
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(new_rows_RX, table.device_mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _to_owners(tensors: tuple[Tensor, ...], owner_S: Tensor, ranks: Ranks) -> list[Tensor]:
    """Send row s of every tensor to rank owner_S[s]; returns what arrived here, in the same order in all."""
    order_S, send_W = owner_S.argsort(), owner_S.bincount(minlength=ranks.world)
    receive_W = torch.empty_like(send_W)
    dist.all_to_all_single(receive_W, send_W, group=ranks.control)
    arrived = []
    for tensor in tensors:
        arrived.append(tensor.new_empty(int(receive_W.sum()), *tensor.shape[1:]))
        dist.all_to_all_single(arrived[-1], tensor[order_S], receive_W.tolist(), send_W.tolist(), group=ranks.control)
    return arrived
