"""What a finished run says of itself: summary.json and memory_usage.json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msn_dist.memory import MemoryHealth
from msn_dist.training.run_directory import git_commit, versions

if TYPE_CHECKING:
    from msn_dist.training.trainer import Trainer

HEADLINE = ("auc", "gauc", "qauc", "logloss", "ne", "calibration")


def summarise(trainer: Trainer, test: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The content of summary.json; a collective call."""
    config, ranks, seconds = trainer.config, trainer.ranks, trainer.watch.seconds()
    summary = {
        "name": config.name,
        "seed": config.seed,
        "world_size": ranks.world,
        "device": str(ranks.device.type),
        "steps": trainer.step,
        "epochs": trainer.epoch + 1,
        "rows": trainer.rows,
        "seconds": seconds,
        "examples_per_second": trainer.rows / seconds,
        "git_commit": git_commit(),
        "versions": versions(),
        "parameters": trainer.parameters,
        "best_step": trainer.best["step"],
        "valid": _split_metrics(trainer.best["metrics"], trainer.schema.labels),
        "test": _split_metrics(test, trainer.schema.labels),
        **trainer.meter.whole_run(),
    }
    if trainer.checkpoint is not None:
        summary["checkpoint"] = trainer.checkpoint
    if trainer.forecast is not None:
        summary["forecast"] = trainer.forecast.summary()
    if trainer.back_ends:
        summary["memory_back_ends"] = trainer.back_ends
    if trainer.health:
        summary["memory"] = _memory(trainer.health)
    return summary


def memory_usage(health: dict[str, MemoryHealth]) -> dict[str, Any]:
    """How the hits of the last interval fall on slots and owners, for the report."""
    usage = {}
    for name, layer in health.items():
        slots = hits = 0
        curve = {"share_of_slots": [0.0], "share_of_hits": [0.0]}
        for mean_hits, count in reversed(layer.histogram):  # the most used slots first
            slots, hits = slots + count, hits + count * mean_hits
            curve["share_of_slots"].append(slots / layer.slots)
            curve["share_of_hits"].append(hits / max(layer.hits, 1))
        usage[name] = {
            "hits_histogram": _histogram(layer.histogram),
            "hits_per_owner": layer.hits_per_owner,
            "rank_curve": curve,
        }
    return usage


def _split_metrics(metrics: dict[str, dict[str, float]], tasks: list[str]) -> dict[str, Any]:
    result: dict[str, Any] = {name: metrics[tasks[0]][name] for name in HEADLINE}
    if len(tasks) > 1:
        result["tasks"] = metrics
    return result


def _memory(health: dict[str, MemoryHealth]) -> dict[str, Any]:
    """Slots of all layers together; of every share the worst layer, as on the console."""
    layers = health.values()
    return {
        "slots": sum(layer.slots for layer in layers),
        "used_share": min(layer.used_share for layer in layers),
        "window_used_share": min(layer.window_used_share for layer in layers),
        "entropy_ratio": min(layer.entropy_ratio for layer in layers),
        "kl_to_uniform": max(layer.kl_to_uniform for layer in layers),
        "top1pct_share": max(layer.top1pct_share for layer in layers),
        "dead_slots": sum(layer.dead_slots for layer in layers),
        "owner_load_max_over_mean": max(layer.owner_load_max_over_mean for layer in layers),
        "layers": {name: layer.summary() for name, layer in health.items()},
    }


def _histogram(histogram: list[tuple[float, int]]) -> dict[str, list[float]]:
    """Slots by hits: one bin for none, then octaves."""
    edges, slots = [0.0, 1.0], [0]
    for hits, count in histogram:
        while hits >= edges[-1]:
            edges.append(2 * edges[-1])
            slots.append(0)
        slots[next(i for i, edge in enumerate(edges[1:]) if hits < edge)] += count
    return {"bin_edges": edges, "slots": slots}
