"""A plan as a file: what `msn plan` writes, `msn train --plan` follows and the report shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from msn_dist.config import MemoryConfig, RunConfig
from msn_dist.data.schema import Schema
from msn_dist.errors import InputError
from msn_dist.planner.layout import in_groups
from msn_dist.strict_yaml import Part, parse

# what the plan itself decides
_FREE = {"memory.strategy", "memory.wire", "memory.value_dtype", "memory.tier", "memory.group_ranks"}


Count = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class PlannedMemory(Part):
    """Of every memory; the names are those of MemoryConfig."""

    strategy: str
    wire: str
    value_dtype: str
    tier: str = "device"
    group_ranks: int | None = None

    @property
    def layout(self) -> str:
        """The strategy, and its groups if they are not nodes."""
        return in_groups(self.strategy, self.group_ranks)

    @property
    def values(self) -> str:
        """What they are stored as, and where if it is not on the device."""
        return self.value_dtype if self.tier == "device" else f"{self.value_dtype} in host memory"


class PlannedTable(Part):
    """Where an id table lies: whole on one rank, or in blocks of rows over all."""

    sharding: Literal["table_wise", "row_wise"]
    rank: NonNegativeInt | None = None  # of a whole one


class PlannedPhase(Part):
    """Seconds of a step; `hidden` of them beside other phases; bytes that a rank sends."""

    name: str
    seconds: Count
    hidden: Count
    sent: Count


class Rival(Part):
    """A layout that was not chosen, and why; times of a whole step in seconds, bytes of the fullest rank."""

    memory: PlannedMemory
    seconds: float
    bytes: int
    allocated: int  # of them, without the margin
    rounds: bool  # more than the config does
    why: str


class PlanFile(Part):
    """A priced plan for one config on one topology."""

    version: Literal[1] = 1
    config: str  # its name
    topology: str
    machine: str
    date: str
    demand: str  # what a step is taken to ask for
    world_size: PositiveInt
    ranks_per_node: PositiveInt
    settings: dict[str, Any]  # of the config, as far as the plan depends on them
    memory: PlannedMemory | None
    id_tables: dict[str, dict[str, PlannedTable]]  # by module and table
    capacity: NonNegativeInt  # bytes that a rank may fill
    storage: dict[str, list[NonNegativeInt]]  # bytes of each rank, by kind
    host_capacity: NonNegativeInt = 0  # bytes of its host that a rank may fill
    host_storage: dict[str, list[NonNegativeInt]] = {}  # the same of its host; empty in the device tier
    phases: list[PlannedPhase]
    owner_load: float  # of the busiest owner over the mean
    reason: str
    rivals: list[Rival]
    seconds_over_ranks: dict[str, list[list[float]]]  # of a step by strategy: [ranks, seconds]

    @model_validator(mode="after")
    def _possible(self) -> PlanFile:
        for tables in self.id_tables.values():
            for name, table in tables.items():
                if (table.sharding == "table_wise") != (table.rank is not None):
                    raise ValueError(f"id table {name}: a whole table has a rank, one by rows has none")
                if table.rank is not None and table.rank >= self.world_size:
                    raise ValueError(f"id table {name} is on rank {table.rank} of {self.world_size}")
        every = *self.storage.values(), *self.host_storage.values()
        if not self.storage or any(len(bytes_W) != self.world_size for bytes_W in every):
            raise ValueError(f"storage must have the bytes of {self.world_size} ranks for every kind")
        if not self.seconds > 0:
            raise ValueError("the phases take no time")
        return self

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(phase.seconds - phase.hidden for phase in self.phases)

    @property
    def bytes_W(self) -> list[int]:
        """In all, on each rank."""
        return [sum(kinds) for kinds in zip(*self.storage.values(), strict=True)]

    @property
    def allocated_W(self) -> list[int]:
        """Most bytes of tensors at once, on each rank: all but the margin, which no tensor takes."""
        kept = [bytes_W for kind, bytes_W in self.storage.items() if kind != "margin"]
        return [sum(kinds) for kinds in zip(*kept, strict=True)]

    def applied_to(self, config: RunConfig, schema: Schema) -> RunConfig:
        """The config that trains as planned; InputError if it, or its data, is not what was planned for."""
        now = settings_of(config, schema)
        for key in sorted(now.keys() | self.settings.keys()):
            if now.get(key) != self.settings.get(key):
                raise InputError(
                    f"the plan, of {self.config}, was made for {key}={self.settings.get(key)!r}, and this run has "
                    f"{now.get(key)!r}; plan again, or train without --plan"
                )
        if (self.memory is None) != (config.memory is None):
            raise InputError("one of plan and config has a memory and the other has none; plan again")
        if self.memory is None:
            return config
        tree = config.memory.model_dump() | self.memory.model_dump()
        return config.model_copy(update={"memory": parse(MemoryConfig, tree, "the plan's memory")})

    def overruled(self, config: RunConfig) -> str:
        """What it decides otherwise than `config`, in words; empty if nothing."""
        if self.memory is None or config.memory is None:
            return ""
        pairs = {name: (value, getattr(config.memory, name)) for name, value in self.memory.model_dump().items()}
        changes = [f"memory.{name}={ours} for {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs]
        return ", ".join(changes)

    def require_machine(self, name: str) -> None:
        """InputError if the run's devices are not those that the plan counts with."""
        if name != self.machine:
            raise InputError(
                f"the plan counts with {self.machine}, and this rank runs on {name}; plan with a profile of it "
                "(msn calibrate)"
            )

    def require_ranks(self, world_size: int, ranks_per_node: int) -> None:
        """InputError if the run has other ranks than the plan."""
        if (world_size, ranks_per_node) != (self.world_size, self.ranks_per_node):
            raise InputError(
                f"the plan is for {_ranks(self.world_size, self.ranks_per_node)}, and this run has "
                f"{_ranks(world_size, ranks_per_node)}; plan for these, or start as planned"
            )


def settings_of(config: RunConfig, schema: Schema) -> dict[str, Any]:
    """Keys of a config that a plan depends on, without those that it decides, and what the data's columns are."""
    tree, columns = config.model_dump(mode="json"), schema.model_dump(mode="json", exclude={"name", "group", "tables"})
    chosen = {
        "model": tree["model"],
        "memory": tree["memory"] or {},
        "data": {"batch_size": config.data.batch_size, **columns},
        "data.tables": schema.tables,
        "optimizer": {"values.kind": config.optimizer.values.kind},
        "training": {"precision": config.training.precision},
    }
    flat = {f"{part}.{key}": value for part, keys in chosen.items() for key, value in keys.items()}
    return {key: value for key, value in flat.items() if key not in _FREE}


def load_plan(path: str | Path) -> PlanFile:
    """Read a file of `msn plan`; InputError if it is none."""
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read this plan ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is no plan of `msn plan`, as it is not valid JSON ({error})") from None
    if not isinstance(tree, dict) or "seconds_over_ranks" not in tree:
        raise InputError(f"{path}: is no plan of `msn plan`; that command writes one with --output")
    try:
        return parse(PlanFile, tree, str(path))
    except InputError as error:
        raise InputError(f"{error}; `msn plan` with --output writes it anew") from None


def write_plan(plan: PlanFile, path: str | Path) -> None:
    """InputError if there is no folder to write it to."""
    try:
        Path(path).write_text(plan.model_dump_json(indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot write the plan here ({error.strerror})") from None


def _ranks(world: int, per_node: int) -> str:
    nodes = world // per_node
    return f"{world} rank{'s' * (world > 1)} ({nodes} node{'s' * (nodes > 1)} of {per_node})"
