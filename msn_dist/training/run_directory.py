"""The folder that a run leaves behind: settings, plan, records, summary.

config.yaml           the resolved settings, as `msn train` takes them
plan.json, plan.txt   where each table lies, for programs and for people
planned.json          the plan that the run was started with (--plan)
metrics.jsonl         one record a logging interval and evaluation, in order of time; what the run started from (--init)
tensorboard/          the same numbers as events
memory_usage.json     how often slots were hit, at the end of the run (models with a memory)
summary.json          the result; its absence means that the run has not finished
checkpoint/           torch.distributed.checkpoint
report.html           written by `msn report`
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msn_dist
from msn_dist.config import RunConfig, dump_config, load_config
from msn_dist.errors import InputError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from msn_dist.planner.plan_file import PlanFile


class RunDirectory:
    """Paths, writers and readers of one run directory. Only rank 0 writes.

    Numbers that are not finite are written as null: JSON has no NaN.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoint = self.path / "checkpoint"
        self.report = self.path / "report.html"
        self.summary_file = self.path / "summary.json"
        self.planned_file = self.path / "planned.json"
        self._events: SummaryWriter | None = None

    @classmethod
    def create(cls, config: RunConfig, path: str | Path) -> RunDirectory:
        """Make the folder and write config.yaml; InputError if the folder holds anything already."""
        run = cls(path)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            taken = any(run.path.iterdir())
        except OSError as error:
            raise InputError(f"{run.path}: cannot make a run directory here ({error.strerror})") from None
        if taken:
            raise InputError(f"{run.path}: is not empty, and a run is never written over another; name a new folder")
        _write(run.path / "config.yaml", dump_config(config))
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """An existing run; InputError if the folder is not one."""
        run = cls(path)
        if not (run.path / "config.yaml").is_file():
            raise InputError(f"{run.path}: is not a run directory (no config.yaml in it); `msn train` makes one")
        return run

    def existing_checkpoint(self) -> Path:
        """The folder of the checkpoint; InputError if there is none."""
        if not self.checkpoint.is_dir():
            raise InputError(f"{self.checkpoint}: there is no checkpoint; the run did not come to its first one")
        return self.checkpoint

    def config(self, overrides: list[str] = ()) -> RunConfig:
        return load_config(self.path / "config.yaml", overrides)

    def write_plan(self, plan: Any, text: str) -> None:
        """The sharding plan as JSON data and as text."""
        _write(self.path / "plan.json", _to_json(plan, indent=2))
        _write(self.path / "plan.txt", text)

    def plan_text(self) -> str | None:
        path = self.path / "plan.txt"
        return path.read_text(encoding="utf-8") if path.exists() else None

    def planned(self) -> PlanFile | None:
        """The plan that the run was started with, or None."""
        if not self.planned_file.exists():
            return None
        from msn_dist.planner.plan_file import load_plan

        return load_plan(self.planned_file)

    def append(self, record: dict[str, Any]) -> None:
        """Add a record of kind "train" or "eval" to metrics.jsonl and to the TensorBoard events."""
        with open(self.path / "metrics.jsonl", "a") as file:  # closed, so flushed: a crash loses no record
            file.write(_to_json(record) + "\n")
        self.open_events()
        for tag, value in _scalars(record):
            self._events.add_scalar(tag, value, record["step"])

    def open_events(self) -> None:
        """Begin the TensorBoard events, if that is not done: takes half a second, for which other ranks may wait."""
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and of no use to a reader

            self._events = SummaryWriter(str(self.path / "tensorboard"), flush_secs=10)

    def records(self, kind: str) -> list[dict[str, Any]]:
        """The records of one kind, in order of time; none if the run stopped before the first."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        *lines, unfinished = path.read_text().split("\n")  # empty, or a record cut off as the run was killed
        records = [_from_json(line, f"{path}: line {number}") for number, line in enumerate(lines, 1)]
        return [record for record in records if record.get("kind") == kind]

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json, the mark of a finished run, and close the events."""
        if self._events is not None:
            self._events.close()
        _write(self.summary_file, _to_json(summary, indent=2) + "\n")

    def summary(self) -> dict[str, Any] | None:
        """The result of the run, or None if it has not finished."""
        return self._read("summary.json")

    def write_memory_usage(self, usage: dict[str, Any]) -> None:
        _write(self.path / "memory_usage.json", _to_json(usage))

    def memory_usage(self) -> dict[str, Any] | None:
        """Hits on the slots of each layer, or None if the run has none or has not finished."""
        return self._read("memory_usage.json")

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        return _from_json(path.read_text(), str(path)) if path.exists() else None


def new_run_path(config: RunConfig) -> Path:
    """``output/name``, with -2, -3, ... after it while that is taken."""
    path, number = Path(config.output, config.name), 1
    while path.exists():
        number += 1
        path = Path(config.output, f"{config.name}-{number}")
    return path


def git_commit() -> str | None:
    """The commit of the checkout that this package is run from; None if it is not run from one."""
    root = Path(msn_dist.__file__).resolve().parents[1]
    git = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        toplevel, commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    # An installation in a virtual environment may lie inside a checkout of something else.
    return commit if Path(toplevel).resolve() == root else None


def versions() -> dict[str, str | None]:
    """Versions that decide a result; None is not installed (msn_dist itself may be run from a checkout)."""
    return {
        "python": platform.python_version(),
        "torch": _version("torch"),
        "torchrec": _version("torchrec"),
        "fbgemm": _version("fbgemm-gpu") or _version("fbgemm-gpu-cpu"),
        "msn_dist": _version("msn-dist"),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """TensorBoard tags: train/loss, memory/layer0/used_share, valid/long_view/auc."""
    if record["kind"] == "eval":
        yield from _flatten(record["metrics"], record["split"])
        return
    yield from _flatten(record.get("memory", {}), "memory")
    yield from _flatten({key: value for key, value in record.items() if key not in ("memory", "step")}, "train")


def _flatten(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}/{key}")
        elif isinstance(value, (int, float)):
            yield f"{prefix}/{key}", value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _from_json(text: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{place}: expected a JSON object, found {type(value).__name__}")
    return value


def _write(path: Path, text: str) -> None:
    """All or nothing: a reader never sees half a file."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
