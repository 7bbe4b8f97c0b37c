"""The config of an evaluation: the model that a run has trained, where and how it is to run now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msn_dist.config import RunConfig
from msn_dist.errors import InputError
from msn_dist.planner.layout import in_groups
from msn_dist.sharding.strategies import require_ranks
from msn_dist.training.ranks import Ranks

# what says where and how a model runs, and not what it is
_FREE = (
    "data.path",
    "data.batch_size",
    "data.workers",
    "memory.strategy",
    "memory.group_ranks",
    "memory.wire",
    "memory.chunks",
    "memory.lookup",
    "memory.retrieval",
    "memory.tier",
    "memory.cache",
    "training.device",
    "training.precision",
    "training.timeout_seconds",
)


def require_same_model(trained: RunConfig, config: RunConfig) -> None:
    """InputError if `config` changes more of what was trained than where and how it runs."""
    before, now = _leaves(trained.model_dump()), _leaves(config.model_dump())
    for key in before | now:
        if before.get(key) != now.get(key) and key not in _FREE:
            raise InputError(
                f"{key}={now.get(key)}: the run was trained with {key}={before.get(key)}, and an evaluation takes it "
                f"as it is; set nothing but {', '.join(_FREE)}"
            )


def on_these_ranks(trained: RunConfig, config: RunConfig, ranks: Ranks, say: Callable[[str], None]) -> RunConfig:
    """`config`, with row_pooled in place of a strategy that the run's ranks could have and these cannot.

    A collective call.  A strategy that was asked for after training stays.
    """
    if config.memory is None or _strategy(config) != _strategy(trained):
        return config
    width = config.memory.value_dim or config.model.width
    try:
        ranks.together(lambda: require_ranks(*_strategy(config), width, ranks.world, ranks.local_world))
    except InputError:
        say(
            f"note: the run's strategy, {in_groups(*_strategy(config))}, does not fit {ranks.world} ranks; "
            "this evaluation reads the same sums by row_pooled"
        )
        by_rows = config.memory.model_copy(update={"strategy": "row_pooled", "group_ranks": None})
        return config.model_copy(update={"memory": by_rows})
    return config


def _strategy(config: RunConfig) -> tuple[str, int | None]:
    return config.memory.strategy, config.memory.group_ranks


def _leaves(tree: Any, key: str = "") -> dict[str, Any]:
    """{dotted key: value}."""
    if not isinstance(tree, dict):
        return {key: tree}
    parts = (_leaves(part, f"{key}.{name}" if key else name) for name, part in tree.items())
    return {leaf: value for part in parts for leaf, value in part.items()}
