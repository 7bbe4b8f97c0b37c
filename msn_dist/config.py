"""The configuration of a run: strict YAML <-> frozen objects.

Every key is known, every type is checked and every combination that cannot work is refused here,
before a process is launched or a tensor is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field, PositiveInt, model_validator

from msn_dist.errors import InputError
from msn_dist.strict_yaml import Part, parse, parse_text, read_yaml

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Width = Annotated[int, Field(gt=0, le=2**16)]
Count = Annotated[int, Field(gt=0, le=2**10)]  # of layers, heads and the like


Strategy = Literal[
    "row_pooled", "row_pooled_sparse", "row_gather", "row_gather_unique", "two_level", "column", "replicated"
]


ValueOptimizerKind = Literal["rowwise_adagrad", "sgd", "rowwise_adam"]


MOST_ROWS = 2**30  # of a step


class DataConfig(Part):
    """Where the rows come from and how they are batched."""

    path: str = Field(description="folder with schema.yaml and train/, valid/, test/ (see `msn prepare`)")
    batch_size: PositiveInt = Field(4096, le=MOST_ROWS, description="rows in a step over all ranks")
    shuffle_buffer: PositiveInt = Field(65_536, description="rows shuffled together on each rank")
    workers: NonNegativeInt = Field(0, description="reader processes per rank; 0 reads in the training process")


class MemoryConfig(Part):
    """Product-key memory of one layer; n = sub_keys ** 2 slots."""

    sub_keys: int = Field(256, ge=2, le=2**21, description="N, sub-keys per axis")
    top_k: int = Field(32, ge=1, description="k, slots read by one query")
    heads: Count = 1
    key_dim: Width = Field(32, description="d_k, width of one half of a key")
    value_dim: Width | None = Field(None, description="D_v; null: the model width, unprojected")
    theta: Literal["none", "key", "mix"] = Field("key", description="over-parameterization of the keys")
    layer_norm: bool = Field(True, description="LayerNorm on queries and keys before the similarity")
    tau: PositiveFloat | None = Field(None, description="scale of the similarity; null: key_dim ** -0.5")
    gate: Literal["tanh", "one_plus_tanh", "sigmoid", "linear", "concat"] = "tanh"
    value_init_std: NonNegativeFloat | None = Field(None, description="null: value_dim ** -0.5")
    value_dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="what the table stores; 16 bits are rounded at random in a step, sums and state stay fp32"
    )
    share: Literal["all", "group", "token"] = Field("all", description="which tokens read the same slots")
    groups: Count | None = Field(None, description="number of token groups, with share: group")
    strategy: Strategy = Field("row_pooled", description="how a table over several ranks is read (README)")
    group_ranks: int | None = Field(
        None, ge=2, description="ranks that add up their sums first, with strategy: two_level; null: those of a node"
    )
    wire: Literal["fp32", "bf16", "fp16", "int8"] = Field(
        "fp32", description="what values and their gradients travel as; 16 bits and less take the weights along in 16"
    )
    chunks: PositiveInt = Field(
        1, le=64, description="parts of a batch whose exchange hides behind the retrieval of the next"
    )
    lookup: Literal["auto", "reference", "fbgemm", "triton"] = Field(
        "auto", description="back end of the sharded table's lookup; auto: triton on a GPU, else fbgemm"
    )
    tier: Literal["device", "host"] = Field(
        "device", description="where the values lie; host: in the host's memory, behind a cache on the GPU"
    )
    cache: Annotated[float, Field(gt=0.0, le=1.0)] = Field(0.1, description="share of the rows that it has room for")
    retrieval: Literal["auto", "reference", "triton"] = Field(
        "auto", description="back end of the search for slots; auto: triton on a GPU, else reference"
    )

    def require_rows(self, rows: int) -> None:
        """InputError if the rows of a rank are fewer than the chunks that they are to be cut into."""
        if self.chunks > rows:
            raise InputError(f"memory.chunks={self.chunks} is more than the {rows} rows of a rank; lower it")

    def parts(self, tokens: int) -> int:
        """Groups of tokens that each have N^2 slots of their own in the table."""
        return {"all": 1, "group": self.groups or 1, "token": tokens}[self.share]

    def why_no_host_tier(self) -> str | None:
        """What keeps the values of this memory on the GPU, with the fix; None if they can lie in the host's memory."""
        if self.lookup in ("reference", "triton"):
            return f"only fbgemm has a cache on the GPU, and this is lookup: {self.lookup}; leave lookup out"
        if self.value_dtype == "bf16":
            return "FBGEMM stores no values of bf16; set value_dtype to fp32 or fp16"
        if self.strategy in ("column", "replicated"):
            return f"strategy: {self.strategy} steps rows past the cache; take a row strategy"
        if self.chunks > 1:
            return f"chunks={self.chunks} would read rows past the cache, for the gradients of weights; set chunks to 1"
        return None

    @model_validator(mode="after")
    def _possible(self) -> MemoryConfig:
        if self.top_k > self.sub_keys:
            raise ValueError(
                f"top_k={self.top_k} is larger than sub_keys={self.sub_keys}: "
                "a query reads at most sub_keys entries of an axis; lower top_k or raise sub_keys"
            )
        if self.value_dim is not None and self.value_dim % 4:
            raise ValueError(f"value_dim={self.value_dim} is not a multiple of 4, as the lookup needs")
        if self.lookup == "fbgemm" and self.strategy in ("column", "replicated"):
            raise ValueError(
                f"lookup: fbgemm cannot serve strategy: {self.strategy}, whose optimizer step takes part of every row "
                "from other ranks; leave lookup out"
            )
        if self.tier == "host" and (reason := self.why_no_host_tier()):
            raise ValueError(f"tier: host: {reason}, or leave tier out")
        if self.group_ranks is not None and self.strategy != "two_level":
            raise ValueError(
                f"group_ranks={self.group_ranks} is set, and strategy: {self.strategy} has no groups of ranks; "
                "leave it out (null), or take strategy: two_level"
            )
        if (self.groups is not None) != (self.share == "group"):
            raise ValueError("groups and share: group belong together; set both or neither")
        return self


class RankMixerConfig(Part):
    """RankMixer backbone: tokens are mixed, then each goes through one of five blocks."""

    backbone: Literal["rankmixer"] = "rankmixer"
    block: Literal["ffn", "gated_ffn", "smoe", "msn_ffn", "msn_smoe"] = "msn_ffn"
    tokens: Count = Field(8, description="T")
    width: Width = Field(64, description="D, must be a multiple of tokens")
    layers: Count = 2
    ffn_ratio: PositiveFloat = Field(2.0, le=2**10, description="hidden width of an FFN over D")
    experts: Count = Field(6, description="experts of an SMoE block")
    active_experts: Count = Field(2, description="experts that a token visits")
    balance_weight: NonNegativeFloat = Field(0.01, description="weight of the experts' balance loss")
    memory_layers: list[NonNegativeInt] | None = Field(
        None, description="layers of an msn block that carry memory; null: every second one, the last included"
    )
    embedding_dim: Width = 16
    attention: bool = Field(False, description="target attention over the histories, beside their mean")
    dropout: Fraction = 0.0

    @property
    def hidden(self) -> int:
        """Hidden width of an FFN or expert."""
        return max(1, round(self.ffn_ratio * self.width))

    @property
    def carries_memory(self) -> bool:
        return self.block.startswith("msn_")

    @property
    def layers_with_memory(self) -> list[int]:
        if not self.carries_memory:
            return []
        if self.memory_layers is not None:
            return self.memory_layers
        return [layer for layer in range(self.layers) if (self.layers - 1 - layer) % 2 == 0]

    @model_validator(mode="after")
    def _possible(self) -> RankMixerConfig:
        if self.width % self.tokens:
            raise ValueError(
                f"width={self.width} is not a multiple of tokens={self.tokens}: "
                "token mixing splits each token into as many heads as there are tokens"
            )
        if self.block.endswith("smoe") and (self.width % 8 or self.hidden % 8):
            raise ValueError(
                f"width={self.width} and ffn_ratio * width={self.hidden} must be multiples of 8, as experts need"
            )
        if self.active_experts > self.experts:
            raise ValueError(f"active_experts={self.active_experts} is larger than experts={self.experts}")
        if self.memory_layers is not None and not self.carries_memory:
            raise ValueError(f"memory_layers is set, but block: {self.block} has no memory; use msn_ffn or msn_smoe")
        if self.carries_memory and not self.layers_with_memory:
            raise ValueError(f"memory_layers is empty, but block: {self.block} needs at least one; use ffn or smoe")
        for layer in self.layers_with_memory:
            if layer >= self.layers:
                raise ValueError(f"memory_layers holds {layer}, but the layers are 0 to {self.layers - 1}")
        if len(set(self.layers_with_memory)) < len(self.layers_with_memory):
            raise ValueError(f"memory_layers={self.memory_layers} names a layer twice")
        return self


class BaselineConfig(Part):
    """What the baselines share: an MLP, and the tokens that read the memory if one is configured."""

    hidden: list[Width] = [400, 400, 400]
    tokens: Count = Field(8, description="T, tokens that read the memory, if there is one")
    width: Width = Field(64, description="D, width of those tokens")
    embedding_dim: Width = 16
    attention: bool = Field(False, description="target attention over the histories, beside their mean")
    dropout: Fraction = 0.0


class DLRMConfig(BaselineConfig):
    """DLRM-MLP: concatenated features through an MLP."""

    backbone: Literal["dlrm"]


class DCNv2Config(BaselineConfig):
    """DCNv2: cross layers beside an MLP."""

    backbone: Literal["dcnv2"]
    cross_layers: Count = 3
    cross_rank: Width | None = Field(None, description="rank of the cross matrices; null: full")


_BACKBONES = {"rankmixer": RankMixerConfig, "dlrm": DLRMConfig, "dcnv2": DCNv2Config}
ModelConfig = Annotated[RankMixerConfig | DLRMConfig | DCNv2Config, Field(discriminator="backbone")]


class DenseOptimizerConfig(Part):
    """AdamW on queries, keys and the rest of the network."""

    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: PositiveFloat | None = Field(10.0, description="bound on the norm of all dense gradients")


class IdOptimizerConfig(Part):
    """Row-wise Adagrad, fused into the backward of the id tables."""

    lr: PositiveFloat = 0.02
    decay_every: ClassVar[int] = 8  # steps at once, since a pass over whole tables is dear
    decay: Fraction = Field(0.0, description="share of every embedding that a step forgets, read or not")
    init_std: NonNegativeFloat = 1e-4


class ValueOptimizerConfig(Part):
    """Fused into the backward of the memory values; rows that a step does not hit are left alone."""

    kind: ValueOptimizerKind = Field("rowwise_adagrad", description="sgd keeps no state, rowwise_adam D_v + 1 numbers")
    multiplier: PositiveFloat = Field(10.0, description="learning rate over that of the dense parameters")
    final_multiplier: PositiveFloat | None = Field(None, description="linear to this at the last step; null: no decay")
    eps: PositiveFloat = Field(1e-8, description="of rowwise_adagrad and rowwise_adam")
    beta1: Fraction = Field(0.9, description="of rowwise_adam: what is kept of the mean gradient in a step")
    beta2: Fraction = Field(0.999, description="of rowwise_adam: the same for the mean square")

    @model_validator(mode="after")
    def _possible(self) -> ValueOptimizerConfig:
        without = {"sgd": ("eps", "beta1", "beta2"), "rowwise_adagrad": ("beta1", "beta2")}.get(self.kind, ())
        for key in without:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is set, and kind: {self.kind} has none; leave it out, or use rowwise_adam")
        return self


class OptimizerConfig(Part):
    dense: DenseOptimizerConfig = DenseOptimizerConfig()
    ids: IdOptimizerConfig = IdOptimizerConfig()
    values: ValueOptimizerConfig = ValueOptimizerConfig()
    warmup_steps: NonNegativeInt = Field(100, description="linear, from 0.1 % of every learning rate")
    schedule: Literal["constant", "linear"] = Field("linear", description="after warm-up; linear falls to 0")


class TrainingConfig(Part):
    epochs: PositiveInt = 1
    max_steps: PositiveInt | None = Field(None, description="stop here, even inside an epoch")
    eval_every: PositiveInt | None = Field(None, description="steps between evaluations; null: after each epoch")
    log_every: PositiveInt = 20
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the dense compute; of the values: memory.value_dtype"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_seconds: PositiveInt = Field(300, description="a collective that waits longer ends the run")


class RunConfig(Part):
    """One run, resolved: what `msn train` takes and what the run directory keeps."""

    union_tags: ClassVar[Mapping[str, type[Part]]] = _BACKBONES

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: int = Field(0, ge=0, lt=2**47)  # ranks and memories have seeds of their own, made of it
    output: str = Field("runs", description="parent of the run directory")
    data: DataConfig
    model: ModelConfig = RankMixerConfig()
    memory: MemoryConfig | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _possible(self) -> RunConfig:
        model, memory = self.model, self.memory
        if isinstance(model, RankMixerConfig):
            if model.carries_memory and memory is None:
                raise ValueError(f"block: {model.block} needs a memory section; add `memory: {{}}` for the defaults")
            if memory is not None and not model.carries_memory:
                raise ValueError(f"memory is set, but block: {model.block} carries none; use msn_ffn or msn_smoe")
        if memory is not None and memory.tier == "host" and self.optimizer.values.kind == "rowwise_adam":
            raise ValueError(
                "memory.tier: host has no cache for optimizer.values.kind: rowwise_adam, whose first moments are as "
                "large as the values; take rowwise_adagrad or sgd, or leave tier out"
            )
        if memory is not None:
            if memory.value_dim is None and model.width % 4:
                raise ValueError(f"model.width={model.width} is not a multiple of 4, as values of that width need")
            if memory.groups is not None and model.tokens % memory.groups:
                raise ValueError(f"memory.groups={memory.groups} does not divide model.tokens={model.tokens}")
        return self


def load_config(path: str | Path, overrides: list[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``dotted.key=value`` overrides (values are YAML) and check it all.

    Raises InputError with the file, the path of each bad key and the nearest valid name.
    """
    path = Path(path)
    tree = read_yaml(path)
    for override in overrides:
        _apply_override(tree, override)
    return parse(RunConfig, tree, str(path))


def dump_config(config: Part) -> str:
    """YAML text that `load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"{override!r}: an override is written key=value, for example training.epochs=2")
    *parents, last = key.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise InputError(f"{override!r}: {parent} holds a value, not a section")
    tree[last] = parse_text(text, override)
