"""The whole model: features, backbone, one head per task."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from msn_dist.config import DCNv2Config, DLRMConfig, MemoryConfig, ModelConfig, RankMixerConfig
from msn_dist.data.batch import Batch
from msn_dist.data.schema import Schema
from msn_dist.memory import Memory
from msn_dist.models.baselines import DLRM, DCNv2
from msn_dist.models.features import Features
from msn_dist.models.rankmixer import RankMixer

_BACKBONES = {RankMixerConfig: RankMixer, DLRMConfig: DLRM, DCNv2Config: DCNv2}


class Output(NamedTuple):
    """What a forward gives; B rows, K tasks."""

    logits_BK: Tensor  # float32, tasks as schema.labels
    auxiliary: Tensor  # scalar to add to the loss, a mean over this rank's rows; 0 without experts or rows


class Ranker(nn.Module):
    """Batch -> Output, one logit per label of the schema.

    `device` is where id tables and memory values are made, "meta" if they are to be sharded; the rest is made on the
    CPU.  Dense weights depend on `seed` alone.
    """

    def __init__(
        self,
        schema: Schema,
        model: ModelConfig,
        memory: MemoryConfig | None = None,
        *,
        seed: int,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.schema, self.model, self.memory = schema, model, memory
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.features = Features(schema, model.embedding_dim, model.attention, device=device)
            self.backbone = _BACKBONES[type(model)](model, self.features.width, memory, seed=seed, device=device)
            self.heads = nn.Linear(self.backbone.out_width, len(schema.labels))

    def forward(self, batch: Batch) -> Output:
        hidden_BH, auxiliary = self.backbone(self.features(batch))
        return Output(in_float32(hidden_BH, self.heads.weight, self.heads.bias), auxiliary)

    def memories(self) -> dict[str, Memory]:
        """The Memory of each layer that has one, keyed "layer0", "layer1", ..."""
        return self.backbone.memories()


@torch.fx.wrap
def in_float32(hidden_BH: Tensor, weight_KH: Tensor, bias_K: Tensor) -> Tensor:
    """logits_BK in float32, also under autocast: logits in bf16 would tie."""
    with torch.autocast(hidden_BH.device.type, enabled=False):
        return nn.functional.linear(hidden_BH.float(), weight_KH, bias_K)
