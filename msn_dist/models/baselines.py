"""DLRM-MLP and DCNv2, each with or without a memory.

Shape suffixes: B rows, F features side by side, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msn_dist.config import DCNv2Config, DLRMConfig, MemoryConfig
from msn_dist.memory import Memory
from msn_dist.models.tokenizer import Tokenizer


class DLRM(nn.Module):
    """An MLP over the features: [B, in_width] -> ([B, out_width], 0)."""

    def __init__(
        self,
        config: DLRMConfig,
        in_width: int,
        memory: MemoryConfig | None,
        *,
        seed: int,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.recall = Recall(config, in_width, memory, seed=seed, device=device)
        self.mlp, self.out_width = mlp(self.recall.out_width, config.hidden, config.dropout)

    def forward(self, features_BF: Tensor) -> tuple[Tensor, Tensor]:
        return self.mlp(self.recall(features_BF)), features_BF.new_zeros(())

    def memories(self) -> dict[str, Memory]:
        return self.recall.memories()


class DCNv2(nn.Module):
    """Cross layers beside an MLP (arXiv 2008.13535), their outputs joined: [B, in_width] -> ([B, out_width], 0)."""

    def __init__(
        self,
        config: DCNv2Config,
        in_width: int,
        memory: MemoryConfig | None,
        *,
        seed: int,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.recall = Recall(config, in_width, memory, seed=seed, device=device)
        width = self.recall.out_width
        self.cross = nn.ModuleList(cross_matrix(width, config.cross_rank) for _ in range(config.cross_layers))
        self.mlp, mlp_width = mlp(width, config.hidden, config.dropout)
        self.out_width = width + mlp_width

    def forward(self, features_BF: Tensor) -> tuple[Tensor, Tensor]:
        x0_BF = self.recall(features_BF)
        x_BF = x0_BF
        for matrix in self.cross:
            x_BF = x0_BF * matrix(x_BF) + x_BF
        return torch.cat([x_BF, self.mlp(x0_BF)], 1), features_BF.new_zeros(())

    def memories(self) -> dict[str, Memory]:
        return self.recall.memories()


class Recall(nn.Module):
    """Features, and beside them what tokens made of them recall from a memory: [B, in_width] -> [B, out_width].

    Without a memory this is the identity.
    """

    def __init__(
        self,
        config: DLRMConfig | DCNv2Config,
        in_width: int,
        memory: MemoryConfig | None,
        *,
        seed: int,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.memory = None
        self.out_width = in_width
        if memory is not None:
            self.tokenizer = Tokenizer(in_width, config.tokens, config.width)
            self.memory = Memory(memory, config.tokens, config.width, seed=seed, device=device)
            self.out_width += config.tokens * config.width

    def forward(self, features_BF: Tensor) -> Tensor:
        if self.memory is None:
            return features_BF
        gated_BTD = self.memory(self.tokenizer(features_BF))
        return torch.cat([features_BF, gated_BTD.flatten(1)], 1)

    def memories(self) -> dict[str, Memory]:
        return {} if self.memory is None else {"layer0": self.memory}


def mlp(in_width: int, hidden: list[int], dropout: float) -> tuple[nn.Sequential, int]:
    """Linear, ReLU and dropout for each hidden width; returns the network and its output width."""
    widths = [in_width, *hidden]
    layers = []
    for width, next_width in zip(widths, hidden, strict=False):
        linear = nn.Linear(width, next_width)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers), widths[-1]


def cross_matrix(width: int, rank: int | None) -> nn.Module:
    """Full, or of low rank as U (V x) + b."""
    if rank is None:
        return nn.Linear(width, width)
    return nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width))
