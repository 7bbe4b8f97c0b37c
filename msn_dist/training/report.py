"""report.html of a run: one self-contained page made from the files in the run directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from msn_dist.config import dump_config
from msn_dist.training import cards
from msn_dist.training.cards import QUALITY, Record, fixed
from msn_dist.training.figures import count, percent
from msn_dist.training.plan_card import plan_card
from msn_dist.training.run_directory import RunDirectory


@dataclass(frozen=True)
class Tile:
    label: str
    value: str
    detail: str


def write_report(run_dir: Path) -> Path:
    """Write report.html into a run directory, finished or not, and return its path.

    Raises InputError if the folder is no run directory or a file in it cannot be read.
    """
    run = RunDirectory.open(run_dir)
    config, summary = run.config(), run.summary()
    train, evaluations = run.records("train"), run.records("eval")
    last = _last_results(evaluations) | (summary or {})
    planned = run.planned()
    memory = [cards.Card("Memory", "This model carries no memory.")]
    if config.memory is not None:
        memory = [cards.health(train), cards.usage(run.memory_usage())]
    page = {
        "name": config.name,
        "finished": summary is not None,
        "story": _story(config.seed, summary, train),
        "tiles": _tiles(last, train, config.memory is not None),
        "cards": [
            cards.quality(evaluations, last),
            cards.training(train),
            *memory,
            cards.speed(train, last),
            *([plan_card(planned, last.get("forecast", {}))] if planned is not None else []),
        ],
        "parameters": [(name.replace("_", " "), f"{value:,}") for name, value in last.get("parameters", {}).items()],
        "versions": {
            **last.get("versions", {}),
            "commit": (last.get("git_commit") or "")[:12],
            **{f"memory {part}": name for part, name in last.get("memory_back_ends", {}).items()},
        },
        "plan": run.plan_text(),
        "settings": dump_config(config),
    }
    pages = Environment(
        loader=PackageLoader("msn_dist.training", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    run.report.write_text(pages.get_template("report.html.j2").render(page), encoding="utf-8")
    return run.report


def _last_results(evaluations: Sequence[Record]) -> Record:
    """The latest evaluation of each split, in the form of a summary: what is known before a run ends."""
    results = {}
    for record in evaluations:
        metrics = record["metrics"]
        results[record["split"]] = next(iter(metrics.values())) | ({"tasks": metrics} if len(metrics) > 1 else {})
    return results


def _story(seed: int, summary: Record | None, train: Sequence[Record]) -> str:
    if summary is not None:
        ranks = f"{_many(summary['world_size'], 'rank')} ({summary['device']})"
        best = f"; results of step {summary['best_step']:,}, the best on valid"
        return f"{_many(summary['steps'], 'step')} in {_clock(summary['seconds'])} on {ranks}, seed {seed}{best}"
    if not train:
        return f"no step recorded yet, seed {seed}"
    return f"{_many(train[-1]['step'], 'step')} in {_clock(train[-1]['seconds'])} so far, seed {seed}"


def _tiles(last: Record, train: Sequence[Record], has_memory: bool) -> list[Tile]:
    valid, test = last.get("valid", {}), last.get("test", {})
    tiles = [
        Tile(f"Test {QUALITY[name]}", fixed(test.get(name)), f"valid {fixed(valid.get(name))}")
        for name in ("auc", "gauc", "logloss")
    ]
    speed = last.get("examples_per_second") or (train[-1]["examples_per_second"] if train else None)
    ranks = f"on {_many(last['world_size'], 'rank')}" if "world_size" in last else "at the last record"
    tiles.append(Tile("Examples / s", count(speed) if speed else "-", ranks))
    if parameters := last.get("parameters"):
        tiles.append(Tile("Parameters", count(parameters["total"]), f"{count(parameters['activated'])} active per row"))
    else:
        tiles.append(Tile("Parameters", "-", "counted at the end"))
    if memory := last.get("memory"):
        tiles.append(Tile("Memory slots", count(memory["slots"]), f"{percent(memory['used_share'])} used"))
    else:
        tiles.append(Tile("Memory slots", "-", "counted at the end" if has_memory else "this model carries none"))
    return tiles


def _many(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + "s" * (number != 1)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
