"""The memory of one layer: product keys choose slots, their values gate the token."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from msn_dist.config import MemoryConfig
from msn_dist.errors import InputError
from msn_dist.memory.autocast import autocast_dtype
from msn_dist.memory.gate import Gate
from msn_dist.memory.product_keys import ProductKeys
from msn_dist.memory.values import VALUE_DTYPES, MemoryValues, ValueSharding


class Memory(nn.Module):
    """x~ = gate(x, sum over heads and hits of w_j V[r_j]) for every token of every sample.

    Shape suffixes: B samples, T tokens, D width, H heads, K hits of a head, L = H * K, M = B * T bags, V value width.

    Args:
        tokens: T, number of tokens of a sample.
        width: D, width of a token.
        seed: of the value table; two memories of one model get different ones.
        device: of the value table; "meta" if it is to be sharded.
    """

    def __init__(
        self, config: MemoryConfig, tokens: int, width: int, *, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        value_dim = config.value_dim or width
        groups = config.parts(tokens)
        if tokens % groups:
            raise InputError(f"memory.groups={groups} does not divide tokens={tokens}")
        if value_dim % 4:
            raise InputError(f"values of width {value_dim} are not a multiple of 4, as the lookup needs; set value_dim")
        self.keys = ProductKeys(config, width)
        self.values = MemoryValues(
            config.sub_keys**2 * groups,
            value_dim,
            init_std=config.value_init_std if config.value_init_std is not None else value_dim**-0.5,
            seed=seed,
            dtype=VALUE_DTYPES[config.value_dtype],
            sharding=ValueSharding(
                config.strategy, config.wire, config.lookup, config.tier, config.cache, config.group_ranks
            ),
            device=device,
        )
        self.gate = Gate(config.gate, width, value_dim)
        self.tokens_per_group, self.slots_per_group = tokens // groups, config.sub_keys**2
        self.chunks = config.chunks

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The gated tokens, shaped like x_BTD and typed as it, or as autocast types products."""
        # once for queries and gate, and their gradients are added up before they are widened
        x_BTD = x_BTD.to(autocast_dtype(x_BTD.device.type) or x_BTD.dtype)
        if self.chunks == 1:
            pooled_MV = self.values(*self.retrieve(x_BTD))
        else:  # by rows of the batch: the messages of one chunk travel while the next one is retrieved
            chunks = x_BTD.tensor_split(self.chunks)
            pooled_MV = torch.cat(self.values.pooled_in_chunks(self.retrieve(chunk) for chunk in chunks))
        return self.gate(x_BTD, pooled_MV.unflatten(0, x_BTD.shape[:2]))

    def retrieve(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """slots_ML (int64) and weights_ML of the M = B * T bags."""
        slots_BTHK, weights_BTHK = self.keys(x_BTD)
        if self.tokens_per_group < x_BTD.shape[1]:  # one table for all groups: slot id + group * n
            group_T = torch.arange(x_BTD.shape[1], device=x_BTD.device) // self.tokens_per_group
            slots_BTHK = slots_BTHK + (group_T * self.slots_per_group)[:, None, None]
        shape_ML = x_BTD.shape[:2].numel(), math.prod(slots_BTHK.shape[2:])
        return slots_BTHK.view(shape_ML), weights_BTHK.view(shape_ML)
