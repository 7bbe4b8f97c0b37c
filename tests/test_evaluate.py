"""`msn evaluate` on other ranks, devices and data than the run had: the same model, or a clear refusal."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from two_ranks import msn_launched, msn_on_two_ranks

from msn_dist.config import load_config
from msn_dist.data.folder import write_schema
from msn_dist.launch.cli import main
from msn_dist.training import run
from msn_dist.training.evaluated_config import on_these_ranks
from msn_dist.training.run_directory import RunDirectory
from tiny_data import MEMORY, SCHEMA, config_of, write_data

GROUPS = {"strategy": "two_level", "group_ranks": 2}  # of four ranks, say; on one rank all strategies are the same


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("evaluated")
    write_data(folder / "data")
    run.train(config_of(folder / "data", "msn_ffn", memory=MEMORY | GROUPS), folder / "run")
    return RunDirectory.open(folder / "run")


def metrics_of(trained: RunDirectory) -> list[str]:
    """Lines of the console."""
    numbers = trained.summary()["test"]["tasks"]
    names = ("auc", "gauc", "qauc", "logloss", "ne")
    step = trained.summary()["best_step"]
    return [
        f"test  step {step}  {task:<4}  " + "  ".join(f"{name} {metrics[name]:.4f}" for name in names)
        for task, metrics in numbers.items()
    ]


NOTE = (
    "note: the run's strategy, two_level in groups of 2, does not fit 2 ranks; "
    "this evaluation reads the same sums by row_pooled"
)
BY_COLUMNS = ["memory.strategy=column", "memory.group_ranks=null", "data.batch_size=30", "memory.lookup=auto"]


@pytest.mark.parametrize(("overrides", "notes"), [([], [NOTE]), (BY_COLUMNS, [])], ids=["as trained", "with overrides"])
def test_ranks_that_the_strategy_of_the_run_does_not_fit_evaluate_it_all_the_same(
    overrides: list[str], notes: list[str], trained: RunDirectory, tmp_path: Path
) -> None:
    exit_codes, output = msn_on_two_ranks(tmp_path, ["evaluate", str(trained.path), *overrides])
    assert exit_codes == [0, 0], output
    assert output.splitlines() == [*notes, *metrics_of(trained)]


def test_as_many_processes_as_are_asked_for_evaluate_a_run(trained: RunDirectory, tmp_path: Path) -> None:
    result = msn_launched(tmp_path, ["evaluate", str(trained.path), "--nproc", "2", "--split", "valid"])
    assert result.returncode == 0, result.stderr
    note, *lines = result.stdout.splitlines()
    assert note == NOTE and lines and all(line.startswith("valid ") for line in lines)


def test_of_a_run_that_has_not_ended_no_step_is_told(
    trained: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(trained.path, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    run.evaluate(tmp_path / "run")
    step = trained.summary()["best_step"]
    assert capsys.readouterr().out.splitlines() == [
        line.replace(f"step {step} ", "step unknown ") for line in metrics_of(trained)
    ]


def test_a_strategy_that_is_asked_for_has_to_fit(trained: RunDirectory, tmp_path: Path) -> None:
    exit_codes, output = msn_on_two_ranks(tmp_path, ["evaluate", str(trained.path), "memory.group_ranks=3"])
    assert exit_codes == [2, 2]
    assert output == ("memory.group_ranks=3: 2 ranks are not several groups of 3; leave it out for groups of a node\n")


def test_too_many_ranks_for_columns_read_rows() -> None:
    config = config_of(Path("data"), "msn_ffn", memory=MEMORY | {"value_dim": 4, "strategy": "column"})
    said: list[str] = []
    for world, strategy in ((1, "column"), (2, "column"), (3, "row_pooled")):
        ranks = SimpleNamespace(world=world, local_world=world, together=lambda build: build())
        assert on_these_ranks(config, config, ranks, said.append).memory.strategy == strategy
    (note,) = said
    assert note.startswith("note: the run's strategy, column, does not fit 3 ranks; ")


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return stop.value.code or 0


@pytest.fixture
def of_a_gpu(trained: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run as a GPU would have left it, on a machine that has none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    path = tmp_path / "run"
    shutil.copytree(trained.path, path)
    settings = (path / "config.yaml").read_text()
    for before, now in (("device: cpu", "cuda"), ("lookup: auto", "triton"), ("retrieval: auto", "triton")):
        assert before in settings
        settings = settings.replace(before, f"{before.split()[0]} {now}")
    (path / "config.yaml").write_text(settings)
    return path


def test_a_run_of_a_gpu_is_evaluated_on_a_cpu_as_each_refusal_says(
    of_a_gpu: Path, trained: RunDirectory, capsys: pytest.CaptureFixture
) -> None:
    overrides: list[str] = []
    for refusal, override in (
        (
            "training.device=cuda or --device cuda: torch sees no GPU here (`msn doctor` says why); use cpu or auto",
            "training.device=cpu",
        ),
        ("memory.retrieval=triton: the kernels need a CUDA GPU", "memory.retrieval=auto"),
        ("memory.lookup=triton: the kernels need a CUDA GPU", "memory.lookup=auto"),
    ):
        assert exit_code("evaluate", str(of_a_gpu), *overrides) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith(refusal)
        overrides.append(override)
    assert exit_code("evaluate", str(of_a_gpu), *overrides) == 0
    assert capsys.readouterr().out.splitlines() == metrics_of(trained)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "memory.top_k=3",
            "memory.top_k=3: the run was trained with memory.top_k=4, and an evaluation takes it as it is",
        ),
        ("memory.sub_keys=16", "memory.sub_keys=16: the run was trained with memory.sub_keys=9, "),
        ("memory.gate=sigmoid", "memory.gate=sigmoid: the run was trained with memory.gate=tanh, "),
        ("memory={strategy: column}", "memory.sub_keys=256: the run was trained with memory.sub_keys=9, "),
        ("model.layers=4", "model.layers=4: the run was trained with model.layers=3, "),
        (
            "memory.strategy=column",
            "memory: group_ranks=2 is set, and strategy: column has no groups of ranks; leave it out (null)",
        ),
        ("optimizer.dense.lr=0.1", "optimizer.dense.lr=0.1: the run was trained with optimizer.dense.lr=0.001, "),
        ("memory.lokup=auto", "memory.lokup: unknown key; did you mean 'lookup'?"),
        ("training.device", "'training.device': an override is written key=value"),
    ],
)
def test_an_override_that_would_change_what_was_trained_is_refused(
    override: str, message: str, trained: RunDirectory, capsys: pytest.CaptureFixture
) -> None:
    assert exit_code("evaluate", str(trained.path), override) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error


def test_data_of_another_schema_are_refused(
    trained: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_data(tmp_path / "data")
    config = load_config(trained.path / "config.yaml")
    same = exit_code("evaluate", str(trained.path), f"data.path={tmp_path / 'data'}")
    assert same == 0 and Path(config.data.path) != tmp_path / "data"
    (tmp_path / "data" / "schema.yaml").unlink()
    write_schema(tmp_path / "data", SCHEMA.model_copy(update={"tables": SCHEMA.tables | {"user": 41}}))
    capsys.readouterr()
    assert exit_code("evaluate", str(trained.path), f"data.path={tmp_path / 'data'}") == 2
    assert capsys.readouterr().err == (
        f"{trained.checkpoint}: is of another model; data.path={tmp_path / 'data'} must have the schema that it was "
        "trained on: features.id_tables.embedding_bags.user.weight is (40, 8) there and (41, 8) here\n"
    )
