"""What each strategy of the exchange sends, to the byte, from the hits alone: no process is needed.

The formulas stand in the docstrings of the strategies (msn_dist/sharding); here they are for any deal of bags and hits
to ranks.  `Traffic` of the exchange counts the same bytes under the same names.

Shape suffixes: C chunks, W ranks, WW from a rank (first) to an owner (second), M bags of a rank, L hits a bag.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from msn_dist.config import ValueOptimizerKind
from msn_dist.memory.placement import Placement
from msn_dist.sharding.hit_wire import weight_dtype
from msn_dist.sharding.row_sharded import shard_of
from msn_dist.sharding.wire import row_bytes


@dataclass(frozen=True)
class Demand:
    """The hits of one step, as far as the exchange depends on them; counts are int64."""

    slots: int  # n
    hits: int  # L
    bags_W: Tensor
    hits_WW: Tensor
    pairs_WW: Tensor  # bags of the rank that have a hit on the owner
    distinct_WW: Tensor  # rows of the owner that the rank's hits fall on, of each chunk for itself
    distinct: int  # rows that any rank's hits fall on
    chunks: int = 1

    @staticmethod
    def of(slots_W: Sequence[Tensor], placement: Placement) -> Demand:
        """The demand of slots_ML [M, L] on each rank."""
        world, slots = len(slots_W), placement.slots
        block, *_ = shard_of(slots, world, 0)
        rows_W = [placement.row_of(slots_ML) for slots_ML in slots_W]

        def per_owner(owners: Tensor) -> Tensor:
            return torch.bincount(owners.flatten(), minlength=world)

        pairs = []
        for row_ML in rows_W:
            hit_MW = torch.zeros(len(row_ML), world, dtype=torch.int64)
            hit_MW.scatter_(1, row_ML // block, 1)
            pairs.append(hit_MW.sum(0))
        return Demand(
            slots=slots,
            hits=slots_W[0].shape[1],
            bags_W=torch.tensor([len(row_ML) for row_ML in rows_W]),
            hits_WW=torch.stack([per_owner(row_ML // block) for row_ML in rows_W]),
            pairs_WW=torch.stack(pairs),
            distinct_WW=torch.stack([per_owner(row_ML.unique() // block) for row_ML in rows_W]),
            distinct=len(torch.cat([row_ML.flatten() for row_ML in rows_W]).unique()),
        )

    @staticmethod
    def of_chunks(slots_CW: Sequence[Sequence[Tensor]], placement: Placement) -> Demand:
        """The same of a step in chunks: slots_ML of each of them, on each rank."""
        parts = [Demand.of(slots_W, placement) for slots_W in slots_CW]
        whole = Demand.of([torch.cat(slots_C) for slots_C in zip(*slots_CW, strict=True)], placement)
        return replace(whole, distinct_WW=sum(part.distinct_WW for part in parts), chunks=len(parts))


def bytes_of_step(
    strategy: str,
    demand: Demand,
    dim: int,
    wire: str = "fp32",
    group_ranks: int = 1,
    optimizer: ValueOptimizerKind = "rowwise_adagrad",
) -> list[dict[str, dict[str, int]]]:
    """{direction: {message: bytes}} that each rank sends to others in one forward and backward.

    `group_ranks`: of two_level's groups, which the ranks are a multiple of.
    """
    world = len(demand.bags_W)
    if world == 1:
        return [{}]
    block, *_ = shard_of(demand.slots, world, 0)
    row = 4 if block < 2**31 else 8
    weight, value = weight_dtype(wire).itemsize, row_bytes(wire, dim)
    others_W = demand.bags_W.sum() - demand.bags_W  # bags of the other ranks
    mine_W = (world - 1) * demand.bags_W  # this rank's bags, once for each other rank

    def headers(counts: int) -> dict[str, Tensor]:
        return {"counts": torch.full((world,), 8 * counts * (world - 1) * demand.chunks)}

    match strategy:
        case "row_pooled" | "row_pooled_sparse" | "two_level":
            hit_W, served_W = _away(demand.hits_WW)
            forward = headers(2) | {"hits": hit_W * (row + weight)}
            backward = {"hits_gradient": served_W * 4}
            if strategy != "row_pooled_sparse":
                forward["lengths"] = mine_W * (1 if demand.hits < 256 else 4)
            if strategy == "row_pooled":
                forward["pooled"], backward["pooled_gradient"] = others_W * value, mine_W * value
            elif strategy == "row_pooled_sparse":
                due_W, owed_W = _away(demand.pairs_WW)
                forward["pooled"], backward["pooled_gradient"] = owed_W * value, due_W * value
            else:
                bags_QV = demand.bags_W.view(-1, group_ranks)
                of_place_V = bags_QV.sum(0)  # bags of the ranks with the same place in their groups
                other_places_W = (of_place_V.sum() - of_place_V).repeat(len(bags_QV))
                same_place_W = of_place_V.repeat(len(bags_QV))
                forward["pooled_in_group"] = other_places_W * value
                forward["pooled"] = (same_place_W - demand.bags_W) * value
                backward["pooled_gradient"] = (len(bags_QV) - 1) * demand.bags_W * value
                backward["pooled_in_group_gradient"] = (group_ranks - 1) * same_place_W * value
        case "row_gather" | "row_gather_unique":
            asked_W, owed_W = _away(demand.hits_WW if strategy == "row_gather" else demand.distinct_WW)
            forward = headers(1) | {"rows": asked_W * row, "values": owed_W * value}
            backward = {"values_gradient": asked_W * value}
        case "column":
            row = 4 if demand.slots < 2**31 else 8
            value = row_bytes(wire, -(-dim // world))
            parts_W = torch.tensor([demand.distinct * rank // world for rank in range(world + 1)]).diff()
            forward = headers(1) | {"hits": mine_W * demand.hits * (row + weight), "pooled": others_W * value}
            backward = {"pooled_gradient": mine_W * value, "hits_gradient": others_W * demand.hits * 4}
            if optimizer != "sgd":
                backward["squares"] = (demand.distinct - parts_W + (world - 1) * parts_W) * 4
        case "replicated":
            rows_W = torch.tensor([shard_of(demand.slots, world, rank)[2] for rank in range(world)])
            forward = {}
            backward = {"table_gradient": (demand.slots - rows_W) * value, "table": (world - 1) * rows_W * 4 * dim}
            if optimizer == "rowwise_adam":
                backward["rows_hit"] = demand.slots - rows_W
        case _:
            raise ValueError(f"unknown strategy {strategy!r}")
    return [{"forward": _of(forward, rank), "backward": _of(backward, rank)} for rank in range(world)]


def _away(sent_WW: Tensor) -> tuple[Tensor, Tensor]:
    """(sent to others by each rank, received from others by each rank)."""
    kept_W = sent_WW.diagonal()
    return sent_WW.sum(1) - kept_W, sent_WW.sum(0) - kept_W


def _of(messages: dict[str, Tensor], rank: int) -> dict[str, int]:
    return {name: count for name, bytes_W in messages.items() if (count := int(bytes_W[rank]))}
