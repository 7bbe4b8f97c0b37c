"""What a plan is for: a config, its features, the ranks, what they can do, and which slots are in demand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import torch

from msn_dist.config import MemoryConfig, RunConfig, ValueOptimizerKind
from msn_dist.data.schema import Schema
from msn_dist.errors import InputError
from msn_dist.kernels import sizes
from msn_dist.memory.values import VALUE_DTYPES
from msn_dist.planner.host_tier import cache_bytes
from msn_dist.planner.layout import Layout
from msn_dist.planner.load import Load
from msn_dist.planner.machine import Machine
from msn_dist.planner.storage import slots_of
from msn_dist.planner.topology import Topology
from msn_dist.sharding.lookup import why_not_in_fbgemm
from msn_dist.sharding.value_optimizer import state_bytes

# one object for as many ranks as are looked at, with what it has worked out
_zipf = lru_cache(maxsize=64)(Load.zipf)
_in_chunks = lru_cache(maxsize=64)(Load.in_chunks)


@dataclass(frozen=True)
class Popularity:
    """Which slots are hit: all alike, by Zipf's law on both axes of sub-keys, or as a run has counted."""

    zipf: float | None = None
    usage: Mapping[str, Any] | None = None  # a layer of memory_usage.json

    def load(self, slots: int, bags: int, hits: int, groups: int) -> Load:
        """Of one rank."""
        if self.usage is not None:
            return Load.from_usage(slots, bags, hits, self.usage)
        if self.zipf is not None:
            return _zipf(slots, bags, hits, self.zipf, groups)
        return Load.uniform(slots, bags, hits)

    def __str__(self) -> str:
        if self.usage is not None:
            return "as counted in a run"
        return f"Zipf {self.zipf:g} on both axes" if self.zipf is not None else "all slots alike"


@dataclass(frozen=True)
class Situation:
    """What may be planned for.

    `mean_lengths` are the ids of a mean row in list columns, where they are known; else histories are full.
    Raises InputError if the batch has fewer rows than there are ranks, or the profile is not of this topology.
    """

    config: RunConfig
    schema: Schema
    topology: Topology
    machine: Machine
    popularity: Popularity = Popularity()
    mean_lengths: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        topology, batch = self.topology, self.config.data.batch_size
        if batch < topology.world:
            raise InputError(
                f"data.batch_size={batch} leaves some of the topology's {topology.world} ranks without a row; raise "
                "it, or take fewer ranks"
            )
        self._require_back_ends()
        if self.machine.kind == "cpu" and self.machine.ranks != topology.ranks_per_node:
            raise InputError(
                f"the profile of {self.machine.name} was measured with {self.machine.ranks} ranks at once, and the "
                f"topology has {topology.ranks_per_node} on a node, which share its cores; "
                f"run msn calibrate --nproc {topology.ranks_per_node}"
            )
        if (
            topology.ranks_per_node > 1
            and topology.inside_node is None
            and self.machine.all_to_all.source == "estimated"
        ):
            raise InputError(
                f"the profile of {self.machine.name} was measured with one rank, which sends nothing, and the topology "
                f"has {topology.ranks_per_node} on a node; give inside_node in the topology, or run "
                f"msn calibrate --nproc {topology.ranks_per_node}"
            )

    def _require_back_ends(self) -> None:
        """InputError for what a run on these devices would refuse."""
        kind, device, memory = self.machine.kind, self.config.training.device, self.config.memory
        if device not in ("auto", kind):
            raise InputError(
                f"training.device={device}, and the topology's ranks are {kind}: {self.machine.name}; "
                f"set training.device={kind} or auto, or take another topology"
            )
        if memory is None:
            return
        no_gpu = "the kernels need a CUDA GPU, and the topology's ranks are CPUs" if kind == "cpu" else None
        if kind == "cuda" and self.machine.retrieve is None:
            raise InputError(
                f"the profile of {self.machine.name} has no rates of this project's kernels, which do not run there: a "
                "memory on such GPUs can be trained, but not planned; take GPUs of compute capability 8.0 or more"
            )
        reasons = {
            ("lookup", "triton"): no_gpu or sizes.why_no_lookup(self.dim),
            ("lookup", "fbgemm"): self._why_not_in_fbgemm(memory.value_dtype),
            ("retrieval", "triton"): no_gpu or sizes.why_no_retrieval(memory.top_k, memory.sub_keys, memory.key_dim),
        }
        for (key, back_end), reason in reasons.items():
            if reason is not None and getattr(memory, key) == back_end:
                raise InputError(f"memory.{key}={back_end}: {reason}; set memory.{key} to auto or reference")
        memory.require_rows(self.config.data.batch_size // self.topology.world)  # of the rank with least

    def _why_not_in_fbgemm(self, value_dtype: str) -> str | None:
        return why_not_in_fbgemm(VALUE_DTYPES[value_dtype], torch.device(self.machine.kind), self.optimizer)

    def with_config(self, config: RunConfig) -> Situation:
        return replace(self, config=config)

    @property
    def why_no_fused_retrieval(self) -> str | None:
        """Why GPUs search for slots by torch's operators, which write every score; None where kernels do, or no GPU."""
        if self.memory is None or self.machine.kind == "cpu":
            return None
        if self.memory.retrieval == "reference":
            return "memory.retrieval=reference"
        return sizes.why_no_retrieval(self.memory.top_k, self.memory.sub_keys, self.memory.key_dim)

    @property
    def list_lengths(self) -> dict[str, float]:
        """Mean ids in a row of the columns that have several, where known; without histories, which count as full."""
        return {key: self.mean_lengths[key] for key in self.schema.ids if key in self.mean_lengths}

    @property
    def rows(self) -> int:
        """Of the rank with most."""
        return -(-self.config.data.batch_size // self.topology.world)

    @property
    def memory(self) -> MemoryConfig | None:
        return self.config.memory

    @property
    def optimizer(self) -> ValueOptimizerKind:
        """Of the values."""
        return self.config.optimizer.values.kind

    @property
    def memories(self) -> int:
        """Tables of values."""
        if self.memory is None:
            return 0
        return len(getattr(self.config.model, "layers_with_memory", [0]))

    @property
    def slots(self) -> int:
        """n of a table."""
        return slots_of(self.config)

    @property
    def dim(self) -> int:
        """D_v."""
        return self.memory.value_dim or self.config.model.width

    def least_table_bytes(self, value_dtype: str | None = None, tier: str = "host") -> int:
        """Values, or their cache, and optimizer state of all tables on a rank's device, if they are cut evenly.

        Values are stored as the config says, or as `value_dtype`; on a host that can have them they take least.
        """
        if self.memory is None:
            return 0
        value_dtype = value_dtype or self.memory.value_dtype
        row = self.dim * VALUE_DTYPES[value_dtype].itemsize
        rows = self.slots // self.topology.world
        values = rows * row
        if tier == "host" and self.why_no_host_tier(strategy="row_pooled", value_dtype=value_dtype) is None:
            values = min(values, cache_bytes(rows, row, self.memory.cache))
        return self.memories * (values + rows * state_bytes(self.optimizer, self.dim))

    def why_no_host_tier(self, **changed: str) -> str | None:
        """Why the values cannot lie in the host's memory, with these settings of the memory changed, or None."""
        if self.machine.kind == "cpu":
            return "all memory of a CPU is the host's"
        if self.topology.host_gib is None:
            return "the topology has no host_gib"
        if self.optimizer == "rowwise_adam":
            return "optimizer.values.kind: rowwise_adam has a state as large as the values"
        return self.memory.model_copy(update=changed).why_no_host_tier()

    @cached_property
    def load(self) -> Load | None:
        """Of one table on one rank."""
        if self.memory is None:
            return None
        tokens, chunks = self.config.model.tokens, self.memory.chunks
        hits, groups = self.memory.heads * self.memory.top_k, self.memory.parts(tokens)
        load = self.popularity.load(self.slots, self.rows * tokens, hits, groups)
        rows, longer = divmod(self.rows, chunks)  # as torch.tensor_split cuts them
        return _in_chunks(load, tuple(tokens * (rows + (chunk < longer)) for chunk in range(chunks)))

    @property
    def bare_layout(self) -> Layout:
        """Of a model without memory."""
        return Layout(self.topology.world, self.topology.ranks_per_node, strategy="row_pooled")

    def layout(self, strategy: str, wire: str, value_dtype: str, tier: str = "device") -> Layout:
        """With the look-up that it comes to on these devices."""
        lookup, world = self.memory.lookup, self.topology.world
        width = -(-self.dim // world) if strategy == "column" else self.dim
        if tier == "host":
            lookup = "fbgemm"
        elif lookup == "auto" and self.machine.kind == "cuda" and sizes.why_no_lookup(width) is None:
            lookup = "triton"
        elif lookup == "auto" and strategy in ("column", "replicated") and world > 1:  # on one rank all are the same
            lookup = "reference"
        elif lookup == "auto":
            lookup = "fbgemm" if self._why_not_in_fbgemm(value_dtype) is None else "reference"
        names = strategy, wire, value_dtype, lookup, self.optimizer, tier
        return Layout(world, self.topology.ranks_per_node, *names)
