from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import msn_dist
from msn_dist.config import RunConfig
from msn_dist.errors import InputError
from msn_dist.strict_yaml import parse
from msn_dist.training.run_directory import RunDirectory, git_commit, new_run_path, versions


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    tree = {"name": "demo", "output": str(tmp_path / "runs"), "data": {"path": "data"}, "model": {"backbone": "dlrm"}}
    return parse(RunConfig, tree, "test")


def test_a_taken_name_gets_a_number(config: RunConfig) -> None:
    paths = []
    for _ in range(3):
        paths.append(new_run_path(config))
        RunDirectory.create(config, paths[-1])
    assert [path.name for path in paths] == ["demo", "demo-2", "demo-3"]


def test_config_comes_back_equal(config: RunConfig, tmp_path: Path) -> None:
    RunDirectory.create(config, tmp_path / "run")
    assert RunDirectory.open(tmp_path / "run").config() == config


def test_a_run_is_not_written_over_another(config: RunConfig, tmp_path: Path) -> None:
    RunDirectory.create(config, tmp_path / "run")
    with pytest.raises(InputError, match="run: is not empty"):
        RunDirectory.create(config, tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: cannot make a run directory here"):
        RunDirectory.create(config, tmp_path / "file")


def test_a_folder_without_config_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run directory"):
        RunDirectory.open(tmp_path)


def test_a_missing_checkpoint_is_named(config: RunConfig, tmp_path: Path) -> None:
    run = RunDirectory.create(config, tmp_path / "run")
    with pytest.raises(InputError, match="run/checkpoint: there is no checkpoint"):
        run.existing_checkpoint()
    run.checkpoint.mkdir()
    assert run.existing_checkpoint() == tmp_path / "run" / "checkpoint"


def test_records_are_on_disk_at_once_and_in_the_events(config: RunConfig, tmp_path: Path) -> None:
    run = RunDirectory.create(config, tmp_path / "run")
    train = {"kind": "train", "step": 20, "epoch": 0, "loss": 0.5, "memory": {"layer1": {"used_share": 0.25}}}
    run.open_events()
    run.append(train)
    assert len(list((run.path / "tensorboard").iterdir())) == 1, "the events are begun once"
    assert RunDirectory.open(run.path).records("train") == [train]
    run.append({"kind": "eval", "split": "valid", "step": 20, "metrics": {"like": {"auc": 0.75, "gauc": float("nan")}}})
    run.write_summary({})

    assert run.records("eval")[0]["metrics"] == {"like": {"auc": 0.75, "gauc": None}}
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    values = {tag: events.Scalars(tag)[0] for tag in events.Tags()["scalars"]}
    assert values["train/loss"].value == 0.5
    assert values["memory/layer1/used_share"].value == 0.25
    assert values["valid/like/auc"].value == 0.75
    assert {value.step for value in values.values()} == {20}


def test_numbers_that_are_not_finite_are_null_in_json(config: RunConfig, tmp_path: Path) -> None:
    run = RunDirectory.create(config, tmp_path / "run")
    assert run.summary() is None and run.memory_usage() is None and run.plan_text() is None
    run.write_summary({"test": {"auc": float("nan"), "bins": [1, float("inf")]}, "git_commit": None})
    run.write_plan({"table": ("row_wise", 4)}, "table row_wise")
    assert run.summary() == {"test": {"auc": None, "bins": [1, None]}, "git_commit": None}
    assert json.loads((run.path / "plan.json").read_text()) == {"table": ["row_wise", 4]}
    assert run.plan_text() == "table row_wise"
    assert not list(run.path.glob("*.draft"))


def make_checkout(root: Path) -> str:
    """A git repository with one commit at `root`; returns the commit."""
    git = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


def test_commit_is_that_of_the_checkout_of_this_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(msn_dist, "__file__", str(tmp_path / "msn_dist" / "__init__.py"))
    assert git_commit() is None
    commit = make_checkout(tmp_path)
    assert git_commit() == commit


def test_a_checkout_around_an_installation_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkout(tmp_path)
    site_packages = tmp_path / "venv" / "site-packages"
    site_packages.mkdir(parents=True)
    monkeypatch.setattr(msn_dist, "__file__", str(site_packages / "msn_dist" / "__init__.py"))
    assert git_commit() is None


def test_versions_name_what_decides_a_result() -> None:
    found = versions()
    assert list(found) == ["python", "torch", "torchrec", "fbgemm", "msn_dist"]
    assert found["torch"] and found["torchrec"] and found["fbgemm"]
