"""The training loop: one for every model, device and world size."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from msn_dist.config import RunConfig
from msn_dist.data.batch import Batch
from msn_dist.data.handshake import in_step
from msn_dist.data.on_device import on_device
from msn_dist.data.parquet import ParquetReader
from msn_dist.data.schema import Schema
from msn_dist.errors import Diverged, InputError
from msn_dist.memory import MemoryHealth
from msn_dist.planner.plan_file import PlanFile
from msn_dist.training.checkpoint import Checkpoints, load_model
from msn_dist.training.console import Console
from msn_dist.training.evaluation import evaluate, open_split
from msn_dist.training.exchange_meter import ExchangeMeter
from msn_dist.training.forecast import Forecast
from msn_dist.training.optimizers import Optimizers
from msn_dist.training.ranks import Ranks
from msn_dist.training.run_directory import RunDirectory
from msn_dist.training.sharded_model import (
    build_sharded_model,
    id_table_shards,
    memory_back_ends,
    sharded_memories,
)
from msn_dist.training.step import train_step
from msn_dist.training.stopwatch import Stopwatch


class Trainer:
    """Trains, evaluates, and keeps the checkpoint with the best valid AUC of the first task.

    With a `plan`, tables lie as it says, and what it predicts is compared with what happens.  Values that are
    `to_be_loaded` have no initial ones.
    """

    def __init__(
        self,
        config: RunConfig,
        schema: Schema,
        run: RunDirectory,
        ranks: Ranks,
        plan: PlanFile | None = None,
        *,
        to_be_loaded: bool = False,
    ) -> None:
        self.config, self.schema, self.run, self.ranks = config, schema, run, ranks
        self.train_data = open_split("train", config.data, schema, ranks, config.seed)
        self.valid_data = open_split("valid", config.data, schema, ranks)
        self.model, self.plan, self.parameters = build_sharded_model(
            config, schema, ranks, plan, to_be_loaded=to_be_loaded
        )
        self.memories = sharded_memories(self.model)
        self.back_ends = memory_back_ends(self.model, ranks.device)
        self.steps_per_epoch = ranks.largest(self.train_data.num_batches)
        self.total_steps = self.steps_per_epoch * config.training.epochs
        if config.training.max_steps is not None:
            self.total_steps = min(self.total_steps, config.training.max_steps)
        embeddings = [shard for *_, shard in id_table_shards(self.model)]
        self.optimizers = Optimizers(self.model, embeddings, config.optimizer, self.total_steps)
        self.step = self.epoch = self.rows = 0
        self.watch = Stopwatch(ranks.device)  # training and its log; evaluations are left out
        self.meter = ExchangeMeter(self.memories, ranks)  # the same
        self.health: dict[str, MemoryHealth] = {}  # of the last full interval
        self.best: dict[str, Any] | None = None
        self.checkpoint: dict[str, float] | None = None  # size and times of the last one
        self.forecast: Forecast | None = None
        if plan is not None:
            evaluation = config.training.eval_every or self.steps_per_epoch
            self.forecast = Forecast(plan, ranks, min(evaluation, self.steps_per_epoch, self.total_steps))
        self._checkpoints = Checkpoints(run.checkpoint, ranks)
        self._kept = False  # a checkpoint is there
        self._validated_at: int | None = None

    def fit(self, console: Console, *, keep_start: bool = False) -> None:
        """Train to the last step; afterwards the model holds its best state, which may be the first if `keep_start`."""
        warmup = self.config.optimizer.warmup_steps
        if warmup >= self.total_steps:
            console.say(f"note: {self.total_steps} steps end within optimizer.warmup_steps={warmup}; rates stay low")
        self._interval = _Interval()
        try:
            if keep_start:
                self._validate(console)
            for epoch in range(self.config.training.epochs):
                self.epoch = epoch
                self.train_data.set_epoch(epoch)
                self._train_epoch(console)
                if self._at_the_end():
                    break
        except (InputError, Diverged):  # raised on every rank, and a checkpoint may be half written
            self._checkpoints.wait()
            raise
        self._checkpoints.wait()
        if self._kept:
            start = time.perf_counter()
            load_model(self.run.checkpoint, self.model, self.ranks)
            self.checkpoint = {
                "bytes": self._checkpoints.bytes,
                "write_seconds": self._checkpoints.seconds,
                "model_read_seconds": time.perf_counter() - start,
            }

    def _train_epoch(self, console: Console) -> None:
        settings = self.config.training
        self.model.train()
        steps = on_device(in_step(self.train_data, self.schema, self.ranks.control), self.ranks.device)
        self._resume_clocks()
        for batch, rows in steps if self.forecast is None else self.forecast.watched(steps):
            self._interval.add(self._train_step(batch, rows), rows)
            self.step += 1
            self.rows += rows
            console.step(self.step)
            if self.forecast is not None and (compared := self.forecast.after(self.step)):
                console.say(compared)
            if self.step % settings.log_every == 0 or self._at_the_end():
                self._log(console)
            if self._at_the_end():
                break
            if settings.eval_every and self.step % settings.eval_every == 0:
                self._stop_clocks()
                self._validate(console)
                self.model.train()
                self._resume_clocks()
        self._stop_clocks()
        steps.close()
        self._validate(console)

    def _train_step(self, batch: Batch, rows: int) -> Tensor:
        """One step; returns this rank's summed loss."""
        self.learning_rate = self.optimizers.set_rates(self.step)
        precision = self.config.training.precision
        return train_step(self.model, self.optimizers, batch, rows, self.ranks.world, precision)

    def _resume_clocks(self) -> None:
        self.watch.start()
        self.meter.start()

    def _stop_clocks(self) -> None:
        self.watch.stop()
        self.meter.stop()

    def _at_the_end(self) -> bool:
        return self.step == self.total_steps

    def _log(self, console: Console) -> None:
        """One record; a collective call."""
        loss = self._interval.loss.double().cpu()
        dist.all_reduce(loss, group=self.ranks.control)
        health = {name: values.health() for name, values in self.memories.items()}
        self._keep(health)
        seconds = self.watch.seconds()
        record = {
            "kind": "train",
            "step": self.step,
            "epoch": self.epoch,
            "loss": float(loss) / self._interval.rows,
            "examples_per_second": self._interval.rows / (seconds - self._interval.start),
            "seconds": seconds,
            "learning_rate": self.learning_rate,
        }
        if exchange := self.meter.read(self._interval.steps):
            record["exchange"] = exchange
        if health:
            record["memory"] = {name: layer.summary() for name, layer in health.items()}
        self._interval = _Interval(start=seconds)
        if self.ranks.rank == 0:
            self.run.append(record)
        console.train(record)

    def _keep(self, health: dict[str, MemoryHealth]) -> None:
        """For the summary: the last full interval, as the one that ends the run may be a step long."""
        if not self.health or self.step % self.config.training.log_every == 0:
            self.health = health
        for name, layer in health.items():
            ever = {"used_share": layer.used_share, "dead_slots": layer.dead_slots}
            self.health[name] = replace(self.health[name], **ever)

    def _validate(self, console: Console) -> None:
        """Evaluate on the valid split; keep the state if it is the best so far.

        While the storage has no room for a checkpoint the best state is the last one, as no other can be had again.
        """
        if self._validated_at == self.step:  # an interval ended with the epoch
            return
        self._validated_at = self.step
        metrics = self.evaluate("valid", self.valid_data, console)
        auc = metrics[self.schema.labels[0]]["auc"]
        if self._kept and not (auc > self.best["auc"] or math.isnan(self.best["auc"])):
            return
        if problem := self._checkpoints.save(self.model, self.optimizers, console.say):
            console.say(f"note: no checkpoint of step {self.step}: {problem}")
            if self._kept:
                return
        self._kept = problem is None
        self.best = {"auc": auc, "step": self.step, "metrics": metrics}

    def evaluate(self, split: str, data: ParquetReader, console: Console) -> dict[str, dict[str, float]]:
        """Metrics of every task over all rows of a split, written to the run; a collective call."""
        batches = self.ranks.largest(data.num_batches)
        metrics = evaluate(
            self.model,
            data,
            self.schema,
            self.ranks,
            self.config.training.precision,
            lambda batch: console.evaluating(split, batch, batches),
        )
        step = self.step if split == "valid" else self.best["step"]
        record = {"kind": "eval", "split": split, "step": step, "epoch": self.epoch, "metrics": metrics}
        if self.ranks.rank == 0:
            self.run.append(record)
        console.evaluation(record)
        return metrics


class _Interval:
    """Sums since the last record."""

    def __init__(self, start: float = 0.0) -> None:
        self.start = start
        self.loss = torch.zeros(())
        self.rows = self.steps = 0

    def add(self, loss: Tensor, rows: int) -> None:
        self.loss = self.loss.to(loss.device) + loss
        self.steps += 1
        self.rows += rows
