"""A model that diverges ends the run, but not the writing of its best state before."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from msn_dist.errors import Diverged
from msn_dist.training import checkpoint
from msn_dist.training.checkpoint import Checkpoints
from msn_dist.training.console import Console
from msn_dist.training.ranks import joined_ranks
from msn_dist.training.run_directory import RunDirectory
from msn_dist.training.trainer import Trainer
from tiny_data import SCHEMA, config_of, write_data


class Diverging(Trainer):
    """In the step after the first evaluation."""

    def _train_step(self, *arguments: Any) -> Tensor:
        if self.step == 2:
            next(self.model.module.heads.parameters()).data.fill_(torch.nan)
        return super()._train_step(*arguments)


def test_a_checkpoint_that_is_being_written_when_the_model_diverges_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends as soon as `fit` has raised, and the thread that writes with it."""
    waited_for, write_now, wait = threading.Event(), checkpoint._Replacing.write_data, Checkpoints.wait

    def write_when_waited_for(writer: Any, *arguments: Any) -> Any:
        assert waited_for.wait(60)
        return write_now(writer, *arguments)

    def wait_for(checkpoints: Checkpoints) -> None:
        if checkpoints._writing is not None:
            waited_for.set()
        wait(checkpoints)

    monkeypatch.setattr(checkpoint._Replacing, "write_data", write_when_waited_for)
    monkeypatch.setattr(Checkpoints, "wait", wait_for)
    write_data(tmp_path / "data")
    run = RunDirectory(tmp_path)
    config = config_of(tmp_path / "data", "dlrm", training={"device": "cpu", "max_steps": 6, "eval_every": 2})
    with joined_ranks(config.training) as ranks:
        trainer = Diverging(config, SCHEMA, run, ranks)
        with Console(0, 6, 7) as console, pytest.raises(Diverged):
            trainer.fit(console)
        assert (trainer.step, trainer.best["step"]) == (4, 2)
        complete = run.checkpoint.exists()
        waited_for.set()
        del trainer
    assert complete
