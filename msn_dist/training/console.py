"""What a run says while it trains: a progress bar on a terminal, one line an interval elsewhere."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from msn_dist.training.run_directory import RunDirectory
from msn_dist.units import binary


class Console:
    """Speaks on rank 0 only; every method may be called on every rank. A context manager.

    Records are those of metrics.jsonl: `train` takes the ones of kind "train", `evaluation` those of kind "eval".
    """

    def __init__(self, rank: int, total_steps: int, steps_per_epoch: int, output: RichConsole | None = None) -> None:
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._output = output or RichConsole(quiet=rank != 0, highlight=False)
        self._live = rank == 0 and self._output.is_terminal
        if not self._output.is_terminal:
            self._output.width = 1000  # a file has no width to respect, and a path must survive being copied
        self._bar = Progress(
            BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.fields[eta]}"), expand=True
        )
        self._task = self._bar.add_task("", total=total_steps, eta="")
        self._state, self._trained = Text(no_wrap=True, overflow="ellipsis"), ""
        self._display = Live(Group(self._bar, self._state), console=self._output)

    def __enter__(self) -> Console:
        if self._live:
            self._display.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._display.stop()

    def say(self, text: str) -> None:
        """One line of plain text."""
        self._output.print(text, markup=False, soft_wrap=True)

    def step(self, step: int) -> None:
        """Move the bar; cheap enough for every step."""
        self._bar.update(self._task, completed=step)

    def train(self, record: dict[str, Any]) -> None:
        step = record["step"]
        eta = f"eta {_clock(record['seconds'] / step * (self._total_steps - step))}"
        state = [
            f"epoch {step / self._steps_per_epoch:.1f}",
            f"loss {record['loss']:.4f}",
            f"{_thousands(record['examples_per_second'])} ex/s",
            f"lr {record['learning_rate']:.1e}",
            *_worst_layer(record.get("memory", {})),
            *_exchange(record.get("exchange", {})),
        ]
        if self._live:
            self._state.plain = self._trained = "  ".join(state)
            self._bar.update(self._task, completed=step, eta=eta)
        else:
            self.say("  ".join([f"step {step}/{self._total_steps}", *state, eta]))

    def evaluating(self, split: str, batch: int, batches: int) -> None:
        """Where an evaluation is, on a terminal; cheap enough for every batch."""
        self._state.plain = f"evaluating {split}, {batch} of {batches} batches"

    def evaluation(self, record: dict[str, Any]) -> None:
        self._state.plain = self._trained
        width = max(len(task) for task in record["metrics"])
        for task, metrics in record["metrics"].items():
            numbers = "  ".join(f"{name} {_number(metrics[name])}" for name in ("auc", "gauc", "qauc", "logloss", "ne"))
            self.say(f"{record['split']:<5} step {record['step']}  {task:<{width}}  {numbers}")

    def finish(self, summary: dict[str, Any], run: RunDirectory) -> None:
        """The box that ends a run: key numbers and where to look."""
        grid = Table.grid("", Column(overflow="fold"), padding=(0, 2))
        for split in ("valid", "test"):
            if split in summary:
                names = ("auc", "gauc", "logloss")
                grid.add_row(split, "  ".join(f"{name} {_number(summary[split][name])}" for name in names))
        grid.add_row("speed", f"{summary['examples_per_second']:,.0f} examples/s on {_ranks(summary['world_size'])}")
        if memory := summary.get("memory"):
            grid.add_row("memory", f"{memory['used_share']:.1%} of {memory['slots']:,} slots used")
        grid.add_row("summary", str(run.summary_file))
        grid.add_row("report", str(run.report))
        title = f"{summary['name']}: {summary['steps']:,} steps in {_clock(summary['seconds'])}"
        self._output.print(Panel.fit(grid, title=title, title_align="left"))


def _worst_layer(memory: dict[str, dict[str, float]]) -> list[str]:
    """Health of the memory: each number from the layer where it is worst."""
    if not memory:
        return []
    layers = memory.values()
    return [
        f"used {min(layer['used_share'] for layer in layers):.1%}",
        f"entropy {min(layer['entropy_ratio'] for layer in layers):.2f}",
        f"owner {max(layer['owner_load_max_over_mean'] for layer in layers):.2f}",
    ]


def _exchange(exchange: dict[str, float]) -> list[str]:
    """What all ranks send in a step, and how much of the time on the way nobody waits for."""
    if not exchange:
        return []
    return [f"sent {binary(exchange['bytes_per_step'])}/step", f"hidden {exchange['hidden_share']:.0%}"]


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.4f}"


def _thousands(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _ranks(world_size: int) -> str:
    return "1 rank" if world_size == 1 else f"{world_size} ranks"
