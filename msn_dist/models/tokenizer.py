"""RankMixer's tokenizer (arXiv 2507.15551): a flat feature vector becomes T tokens of one width."""

from __future__ import annotations

from torch import Tensor, nn

from msn_dist.models.linear import PerTokenLinear


class Tokenizer(nn.Module):
    """Cut [B, in_width] into T even chunks, each with its own projection: -> [B, T, D].

    Chunks follow the order of the features, whatever they mean; the last one is padded with zeros.
    """

    def __init__(self, in_width: int, tokens: int, width: int):
        super().__init__()
        self.tokens = tokens
        self.padding = -in_width % tokens
        self.project = PerTokenLinear(tokens, (in_width + self.padding) // tokens, width)

    def forward(self, features_BF: Tensor) -> Tensor:
        return self.project(nn.functional.pad(features_BF, (0, self.padding)).unflatten(1, (self.tokens, -1)))
