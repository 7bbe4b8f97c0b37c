"""RankMixer (arXiv 2507.15551), and MSN (arXiv 2602.07526): RankMixer with a memory in front of its networks.

Shape suffixes: B rows, F features side by side, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msn_dist.config import MemoryConfig, RankMixerConfig
from msn_dist.memory import Memory
from msn_dist.models.blocks import FFN, GatedFFN
from msn_dist.models.moe import SMoE
from msn_dist.models.tokenizer import Tokenizer


class RankMixer(nn.Module):
    """Tokenizer, layers, mean over tokens: [B, in_width] -> ([B, D], auxiliary loss).

    The auxiliary loss is balance_weight times the experts' balance losses summed over layers; 0 without experts.
    """

    def __init__(
        self,
        config: RankMixerConfig,
        in_width: int,
        memory: MemoryConfig | None,
        *,
        seed: int,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.balance_weight = config.balance_weight
        self.tokenizer = Tokenizer(in_width, config.tokens, config.width)
        self.layers = nn.ModuleList()
        for layer in range(config.layers):
            gate = None
            if layer in config.layers_with_memory:
                memory_seed = seed * config.layers + layer  # its own for every run and layer
                gate = Memory(memory, config.tokens, config.width, seed=memory_seed, device=device)
            self.layers.append(RankMixerLayer(config.width, network(config), memory=gate, dropout=config.dropout))
        self.out_width = config.width

    def forward(self, features_BF: Tensor) -> tuple[Tensor, Tensor]:
        x_BTD = self.tokenizer(features_BF)
        auxiliary = features_BF.new_zeros(())
        for layer in self.layers:
            x_BTD, balance = layer(x_BTD)
            auxiliary = auxiliary + self.balance_weight * balance
        return x_BTD.mean(1), auxiliary

    def memories(self) -> dict[str, Memory]:
        return {f"layer{i}": layer.memory for i, layer in enumerate(self.layers) if layer.memory is not None}


class RankMixerLayer(nn.Module):
    """s = LN(x + mix(x)); y = LN(s + network(memory(s))): [B, T, D] -> ([B, T, D], balance).

    The memory gates what the network sees; the residual carries s past the gate.  Norms come after the sums, as in
    RankMixer: a few layers train well so, and the mean over tokens then sees normalised ones.
    """

    def __init__(self, width: int, network: nn.Module, *, memory: nn.Module | None = None, dropout: float = 0.0):
        super().__init__()
        self.mixing_norm = nn.LayerNorm(width)
        self.memory = memory
        self.network = network
        self.dropout = nn.Dropout(dropout)
        self.network_norm = nn.LayerNorm(width)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        s_BTD = self.mixing_norm(x_BTD + mix_tokens(x_BTD))
        gated_BTD = s_BTD if self.memory is None else self.memory(s_BTD)
        y_BTD, balance = self.network(gated_BTD)
        return self.network_norm(s_BTD + self.dropout(y_BTD)), balance


def mix_tokens(x_BTD: Tensor) -> Tensor:
    """Split every token into T heads; token t of the result is head t of all tokens, side by side."""
    tokens = x_BTD.shape[1]
    return x_BTD.unflatten(2, (tokens, -1)).transpose(1, 2).flatten(2)


def network(config: RankMixerConfig) -> nn.Module:
    """The per-token network that `config.block` names, without its memory."""
    hidden = config.hidden
    match config.block.removeprefix("msn_"):
        case "ffn":
            return FFN(config.tokens, config.width, hidden)
        case "gated_ffn":
            return GatedFFN(config.tokens, config.width, hidden)
        case "smoe":
            return SMoE(config.tokens, config.width, hidden, config.experts, config.active_experts)
