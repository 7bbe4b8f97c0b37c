"""How many parameters a model has, and how many of them one row uses."""

from __future__ import annotations

from torch import nn

from msn_dist.models.moe import SMoE
from msn_dist.models.ranker import Ranker


def count_parameters(ranker: Ranker) -> dict[str, int]:
    """Numbers of parameters of a ranker that is not sharded (its tables may be on meta).

    dense: everything outside the two kinds of table
    id_tables: embeddings of ids
    memory_values: values of every memory
    total: the sum of these
    activated: used by one row: dense without the experts that its tokens do not visit, one embedding for an id and
        max_length for a history's column, and heads * top_k values for every token of a memory
    """
    memories = ranker.memories().values()
    id_tables = _count(ranker.features.id_tables) + _count(ranker.features.sequence_tables)
    memory_values = sum(_count(memory.values) for memory in memories)
    total = _count(ranker)
    dense = total - id_tables - memory_values

    schema, model, config = ranker.schema, ranker.model, ranker.memory
    inactive = sum(module.inactive_parameters() for module in ranker.modules() if isinstance(module, SMoE))
    events = sum(history.max_length * len(history.columns) for history in schema.histories.values())
    embeddings_read = (len(schema.ids) + events) * model.embedding_dim
    values_read = 0
    if config is not None:
        values_read = len(memories) * model.tokens * config.heads * config.top_k * (config.value_dim or model.width)
    return {
        "total": total,
        "activated": dense - inactive + embeddings_read + values_read,
        "dense": dense,
        "id_tables": id_tables,
        "memory_values": memory_values,
    }


def _count(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())
