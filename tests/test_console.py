from __future__ import annotations

import io
import logging
import warnings
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from msn_dist.training.console import Console
from msn_dist.training.quiet import quiet_libraries
from msn_dist.training.run_directory import RunDirectory

TRAIN = {"step": 120, "loss": 0.56241, "examples_per_second": 12_345.0, "learning_rate": 1e-3, "seconds": 60.0}
LAYERS = {
    "layer1": {"used_share": 0.841, "entropy_ratio": 0.93, "owner_load_max_over_mean": 1.01},
    "layer3": {"used_share": 0.9, "entropy_ratio": 0.95, "owner_load_max_over_mean": 1.04},
}
EVALUATION = {
    "split": "valid",
    "step": 120,
    "metrics": {
        "long_view": {"auc": 0.73411, "gauc": 0.64211, "qauc": 0.64, "logloss": 0.55241, "ne": 0.91},
        "like": {"auc": float("nan"), "gauc": None, "qauc": 0.5, "logloss": 0.1, "ne": 1.0},
    },
}
SUMMARY = {
    "name": "demo",
    "steps": 400,
    "seconds": 132.2,
    "world_size": 2,
    "examples_per_second": 12_345.0,
    "test": EVALUATION["metrics"]["long_view"],
    "memory": {"slots": 65_536, "used_share": 0.841},
}


def test_a_file_gets_one_line_an_interval() -> None:
    file = io.StringIO()
    with Console(0, total_steps=400, steps_per_epoch=400, output=RichConsole(file=file)) as console:
        for step in range(121):
            console.step(step)
        console.train(TRAIN | {"memory": LAYERS})
        console.train(TRAIN | {"step": 1, "seconds": 0.5})
    assert file.getvalue().splitlines() == [
        "step 120/400  epoch 0.3  loss 0.5624  12.3k ex/s  lr 1.0e-03"
        "  used 84.1%  entropy 0.93  owner 1.04  eta 0:02:20",
        "step 1/400  epoch 0.0  loss 0.5624  12.3k ex/s  lr 1.0e-03  eta 0:03:20",
    ]


def test_evaluations_are_aligned_and_undefined_metrics_are_dashes() -> None:
    file = io.StringIO()
    Console(0, 400, 400, RichConsole(file=file)).evaluation(EVALUATION)
    assert file.getvalue().splitlines() == [
        "valid step 120  long_view  auc 0.7341  gauc 0.6421  qauc 0.6400  logloss 0.5524  ne 0.9100",
        "valid step 120  like       auc -  gauc -  qauc 0.5000  logloss 0.1000  ne 1.0000",
    ]


def test_a_terminal_gets_a_bar_with_the_state_and_results_above_it() -> None:
    file = io.StringIO()
    output = RichConsole(file=file, force_terminal=True, width=100, color_system=None)
    with Console(0, total_steps=400, steps_per_epoch=400, output=output) as console:
        console.train(TRAIN | {"memory": LAYERS})
        console.evaluation(EVALUATION)
    screen = file.getvalue()
    assert "120/400 eta 0:02:20" in screen
    assert "epoch 0.3  loss 0.5624" in screen and "owner 1.04" in screen
    assert "valid step 120  long_view" in screen


def test_a_terminal_is_told_where_an_evaluation_is_and_then_how_training_was() -> None:
    file = io.StringIO()
    output = RichConsole(file=file, force_terminal=True, width=100, color_system=None)
    with Console(0, total_steps=400, steps_per_epoch=400, output=output) as console:
        console.train(TRAIN)
        console.evaluating("valid", 7, 31)
        output.print("now")
        seen = file.getvalue()
        console.evaluation(EVALUATION)
    assert "evaluating valid, 7 of 31 batches" in seen
    assert "loss 0.5624" in file.getvalue()[len(seen) :]


def test_a_file_is_told_nothing_of_an_evaluation_but_its_result() -> None:
    file = io.StringIO()
    with Console(0, total_steps=400, steps_per_epoch=400, output=RichConsole(file=file)) as console:
        console.evaluating("valid", 7, 31)
    assert file.getvalue() == ""


def test_the_last_box_keeps_paths_whole_in_a_file() -> None:
    file = io.StringIO()
    run = RunDirectory(Path("/runs") / ("x" * 150))
    Console(0, 400, 400, RichConsole(file=file)).finish(SUMMARY, run)
    box = file.getvalue()
    assert str(run.report) in box and str(run.summary_file) in box
    assert "demo: 400 steps in 0:02:12" in box
    assert "auc 0.7341  gauc 0.6421  logloss 0.5524" in box
    assert "12,345 examples/s on 2 ranks" in box and "84.1% of 65,536 slots used" in box


def test_other_ranks_say_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with Console(1, total_steps=400, steps_per_epoch=400) as console:
        console.say("nothing")
        console.step(1)
        console.train(TRAIN)
        console.evaluating("valid", 1, 2)
        console.evaluation(EVALUATION)
    console.finish(SUMMARY, RunDirectory("run"))
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def quiet() -> None:
    root, noisy = logging.getLogger(), logging.getLogger("torch.fx._symbolic_trace")
    filters, level = root.filters[:], noisy.level
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        quiet_libraries()
        yield
    root.filters[:] = filters
    noisy.setLevel(level)


def warn_from(module: str, category: type[Warning]) -> None:
    warnings.warn_explicit("text", category, "file.py", 1, module=module)


def test_only_known_noise_is_silenced(quiet: None, caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warn_from("torchrec.distributed.model_parallel", FutureWarning)
        assert not seen
        warn_from("torchrec.distributed.dist_data", UserWarning)  # a lost gradient is one of these
        warn_from("numpy", FutureWarning)
        assert [warning.category for warning in seen] == [UserWarning, FutureWarning]

    logging.warning("_fbgemm_torch_compat_table has no entry for 2.99")
    logging.getLogger("torch.fx._symbolic_trace").warning("is_fx_tracing will return true")
    logging.warning("something else")
    assert caplog.messages == ["something else"]
