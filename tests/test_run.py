"""A whole run by the real command: what its directory holds, and what `evaluate` makes of it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from two_ranks import msn_launched

from msn_dist.config import TrainingConfig, dump_config, load_config
from msn_dist.memory import values
from msn_dist.training import run
from msn_dist.training.ranks import joined_ranks
from msn_dist.training.run_directory import RunDirectory
from msn_dist.training.summary import HEADLINE
from tiny_data import SCHEMA, config_of, write_data

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    write_data(folder / "data")
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path) -> RunDirectory:
    """A run of two epochs by the real command, on two ranks with 150 and 100 rows an epoch: 8 and 5 batches."""
    settings = {"device": "cpu", "epochs": 2, "log_every": 7}
    (folder / "config.yaml").write_text(dump_config(config_of(folder / "data", "msn_ffn", training=settings)))
    command = ["train", str(folder / "config.yaml"), "seed=6", "--nproc", "2", "--out", str(folder / "run")]
    result = msn_launched(ROOT, command)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return RunDirectory.open(folder / "run")


def test_a_run_keeps_its_resolved_settings_and_plan(folder: Path, finished: RunDirectory) -> None:
    assert finished.config() == load_config(folder / "config.yaml", ["seed=6"])
    tables = {table["table"]: table for table in json.loads((finished.path / "plan.json").read_text())["tables"]}
    assert tables["user"]["sharding"] == "table_wise"
    assert tables["item"]["rows_per_rank"] == [15, 15], "attention reads it, so every rank must hold a part"
    assert all(sum(table["rows_per_rank"]) == table["rows"] for table in tables.values())
    assert "memory.values" in finished.plan_text()


def test_a_run_records_training_and_evaluations_to_the_last_step(finished: RunDirectory) -> None:
    train, evaluations = finished.records("train"), finished.records("eval")
    assert [(record["step"], record["epoch"]) for record in train] == [(7, 0), (14, 1), (16, 1)]
    assert all(set(record["memory"]) == {"layer0", "layer2"} for record in train)
    assert all(record["loss"] > 0 and record["examples_per_second"] > 0 for record in train)
    best = finished.summary()["best_step"]
    assert [(r["split"], r["step"]) for r in evaluations] == [("valid", 8), ("valid", 16), ("test", best)]
    assert [list(record["metrics"]) for record in evaluations] == [SCHEMA.labels] * 3

    events = EventAccumulator(str(finished.path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [7, 14, 16]
    assert [event.step for event in events.Scalars("valid/view/auc")] == [8, 16]


def test_the_summary_of_a_run_has_every_number(finished: RunDirectory) -> None:
    summary = finished.summary()
    known = {"name": "msn_ffn", "seed": 6, "world_size": 2, "device": "cpu", "steps": 16, "epochs": 2, "rows": 500}
    assert {key: summary[key] for key in known} == known
    for split, rows in (("valid", 80), ("test", 120)):
        assert all(0 < summary[split][name] < 2 for name in HEADLINE)
        assert summary[split]["tasks"]["view"]["rows"] == rows > summary[split]["tasks"]["like"]["rows"] > 0
    parameters = summary["parameters"]
    assert parameters["memory_values"] == 2 * 81 * 16 and parameters["id_tables"] == 70 * 8
    assert parameters["total"] == parameters["dense"] + parameters["id_tables"] + parameters["memory_values"]
    assert 0 < parameters["activated"] < parameters["total"]
    memory = summary["memory"]
    assert memory["slots"] == 162 and 0.5 < memory["used_share"] <= 1 and 0 < memory["entropy_ratio"] <= 1
    assert 1 <= memory["owner_load_max_over_mean"] <= 2
    assert summary["examples_per_second"] == pytest.approx(500 / summary["seconds"])
    assert summary["versions"]["torch"] == torch.__version__ and len(summary["git_commit"]) in (40, 64)


def test_the_summary_counts_every_byte_between_ranks(finished: RunDirectory) -> None:
    summary = finished.summary()
    sent, backward = summary["bytes_sent"]["forward"], summary["bytes_sent"]["backward"]
    layers, tokens, width = 2, 2, 16
    bags = layers * tokens * (500 + 2 * 80 + 120)  # training, two evaluations of valid, one of test
    steps = layers * (16 + 2 * 3 + 4)
    assert 0.3 < sent.pop("hits") / (bags * 8 * 8) < 0.7  # 8 hits a bag, about half of them remote
    assert 0.3 < backward.pop("hits_gradient") / (layers * tokens * 500 * 8 * 4) < 0.7
    assert sent == {"counts": steps * 2 * 16, "lengths": bags, "pooled": bags * width * 4}
    assert backward == {"pooled_gradient": layers * tokens * 500 * width * 4}
    assert summary["header_bytes"] == steps * 2 * 16 + bags
    (own0, to1), (to0, own1) = summary["bytes_between_ranks"]
    assert own0 == own1 == 0 and to0 > 0 < to1
    assert all(record["exchange"]["bytes_per_step"] > 0 for record in finished.records("train"))
    assert all(0 <= record["exchange"]["hidden_share"] <= 1 for record in finished.records("train"))


def test_a_run_leaves_a_report(finished: RunDirectory) -> None:
    report = finished.report.read_text()
    assert "Ranking quality" in report and "Load of each owner" in report and "<svg" in report


@pytest.mark.parametrize("split", ["valid", "test"])
def test_evaluating_a_run_on_one_rank_repeats_the_metrics_of_two(
    split: str, finished: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "initial_values", None)  # none are made for a checkpoint to replace
    metrics = run.evaluate(finished.path, split)
    for task, expected in finished.summary()[split]["tasks"].items():
        assert metrics[task] == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # torch's own words, which a run silences
def test_more_readers_than_cores_are_told_of_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    settings = ["model.attention=false", "training.epochs=1", "training.max_steps=2"]
    for workers, notes in ((1, []), (2, ["note: 2 reader processes (data.workers) on 1 core; fewer may be faster"])):
        run.train(load_config(folder / "config.yaml", [*settings, f"data.workers={workers}"]), folder / f"by{workers}")
        assert [line for line in capsys.readouterr().out.splitlines() if "reader" in line] == notes


def test_a_checkpoint_that_finds_no_room_is_left_out_and_the_last_state_is_tested(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    config = load_config(folder / "config.yaml", ["model.attention=false", "training.epochs=2"])
    run.train(config, folder / "full")
    printed = capsys.readouterr().out
    assert printed.count("note: no checkpoint of step") == 2 and "1000 B free" in printed
    full = RunDirectory.open(folder / "full")
    assert not full.checkpoint.exists() and "checkpoint" not in full.summary()
    assert full.summary()["best_step"] == full.summary()["steps"]


def test_the_summary_tells_how_long_the_checkpoint_took(finished: RunDirectory) -> None:
    checkpoint = finished.summary()["checkpoint"]
    on_disk = sum(file.stat().st_size for file in finished.checkpoint.rglob("*.distcp"))
    assert 0 < checkpoint["bytes"] <= on_disk
    assert checkpoint["write_seconds"] > 0 and checkpoint["model_read_seconds"] > 0


@pytest.mark.parametrize(("device", "threads"), [("cpu", 2), pytest.param("cuda", 1, marks=pytest.mark.gpu)])
def test_the_host_of_a_gpu_computes_with_one_thread(device: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with joined_ranks(TrainingConfig(device=device)):
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
