"""Which rank holds what: memory tables by rows, id tables whole or by rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import nn
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ModuleSharder, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingCollection

from msn_dist.errors import InputError
from msn_dist.memory import MemoryValues
from msn_dist.planner.plan_file import PlannedTable

_ROW_WISE_FROM = 2**20  # an id table of so many rows, and of more than a rank's fair share, is cut by rows


@dataclass(frozen=True)
class TableShards:
    """Where one table lies."""

    module: str
    table: str
    kind: str  # "memory" or "ids"
    rows: int
    dim: int
    sharding: str  # "row_wise" or "table_wise"; of a memory its strategy
    rows_per_rank: list[int]


@dataclass(frozen=True)
class Plan:
    """The layout of every table of a model over `world_size` ranks."""

    world_size: int
    tables: list[TableShards]
    sharding: ShardingPlan  # the same, as DistributedModelParallel takes it

    def as_json(self) -> dict:
        return {"world_size": self.world_size, "tables": [asdict(table) for table in self.tables]}

    def __str__(self) -> str:
        """One line a table."""
        width = max((len(t.module) + len(t.table) for t in self.tables), default=0) + 3
        layout = max((len(t.sharding) for t in self.tables), default=0) + 2
        lines = [f"{'table':{width}}{'rows':>14}{'dim':>6}  {'sharding':{layout}}rows per rank"]
        for t in self.tables:
            held = t.rows_per_rank
            spread = f"{held[0]:,}" if len(set(held)) == 1 else f"{min(held):,} to {max(held):,}"
            if t.sharding == "table_wise":
                spread = f"all on rank {held.index(t.rows)}"
            elif t.sharding == "column":
                spread = f"{t.rows:,}, {-(-t.dim // self.world_size)} of {t.dim} columns"
            lines.append(f"{t.module + '.' + t.table:{width}}{t.rows:>14,}{t.dim:>6}  {t.sharding:{layout}}{spread}")
        return "\n".join(lines)


def make_plan(
    model: nn.Module,
    sharders: Sequence[ModuleSharder],
    world_size: int,
    local_size: int,
    device_type: str,
    id_tables: Mapping[str, Mapping[str, PlannedTable]] | None = None,
) -> Plan:
    """Memory values as their strategy says; id tables whole, the largest first onto the emptiest rank.

    Very large id tables, and those read by attention, are cut by rows instead.  `model` may be on the meta device.
    `id_tables` places them as a plan has it, by module and table.  InputError if attention reads a table with too few
    rows for every rank to hold one.
    """
    sharder_of = {sharder.module_type: sharder for sharder in sharders}
    tables: list[TableShards] = []
    sharding = ShardingPlan(plan={})
    load = [0] * world_size
    for path, module in model.named_modules():
        sharder = sharder_of.get(type(module))
        if sharder is None:
            continue
        kind = "memory" if isinstance(module, MemoryValues) else "ids"
        parameters = sharder.shardable_parameters(module)
        fair_share = sum(weight.numel() for weight in parameters.values()) / world_size
        choice = {}
        for table, weight in sorted(parameters.items(), key=lambda item: (-item[1].numel(), item[0])):
            rows, dim = weight.shape
            # TorchRec's unpooled lookup fails on a gloo rank that holds no part of any table.
            on_all_ranks = world_size > 1 and isinstance(module, EmbeddingCollection)
            if kind == "memory":  # by its own sharder; TorchRec's plan has no words for the strategies
                choice[table] = row_wise(compute_kernel="fused")
                scheme, held = module.sharding.strategy, _rows_held(rows, world_size)
                if scheme in ("column", "replicated"):
                    held = [rows] * world_size
            elif _by_rows(id_tables, path, table, on_all_ranks or (rows >= _ROW_WISE_FROM and rows * dim > fair_share)):
                scheme, held = "row_wise", _rows_held(rows, world_size)
                if not min(held):
                    raise InputError(
                        f"{path}: table {table!r} is read as sequences, and its {rows} rows leave a rank of "
                        f"{world_size} without any; use fewer ranks, or model.attention=false"
                    )
                choice[table] = row_wise(compute_kernel="fused")
            else:
                scheme = "table_wise"
                owner = load.index(min(load)) if id_tables is None else id_tables[path][table].rank
                held = [rows if rank == owner else 0 for rank in range(world_size)]
                choice[table] = table_wise(rank=owner, compute_kernel="fused")
                load[owner] += rows * dim
            tables.append(TableShards(path, table, kind, rows, dim, scheme, held))
        sharding.plan[path] = construct_module_sharding_plan(
            module, {table: choice[table] for table in parameters}, sharder, local_size, world_size, device_type
        )
    _require_all_known(id_tables or {}, tables)
    return Plan(world_size, tables, sharding)


def _require_all_known(id_tables: Mapping[str, Mapping[str, PlannedTable]], tables: Sequence[TableShards]) -> None:
    """InputError if a plan has id tables that the model lacks."""
    here = {(table.module, table.table) for table in tables}
    unknown = [f"{name!r} in {path}" for path, names in id_tables.items() for name in names if (path, name) not in here]
    if unknown:
        raise InputError(
            f"the plan has table {unknown[0]}, which the model lacks; plan again with this data set's schema"
        )


def _by_rows(
    id_tables: Mapping[str, Mapping[str, PlannedTable]] | None, path: str, table: str, by_default: bool
) -> bool:
    """As planned; InputError if the plan does not know the table."""
    if id_tables is None:
        return by_default
    if table not in id_tables.get(path, {}):
        raise InputError(f"the plan has no table {table!r} in {path}; plan again with this data set's schema")
    return id_tables[path][table].sharding == "row_wise"


def _rows_held(rows: int, world_size: int) -> list[int]:
    """Blocks of ceil(rows / W)."""
    block = -(-rows // world_size)
    return [max(0, min(block, rows - rank * block)) for rank in range(world_size)]
