"""`msn plan`, `msn train --plan` and `msn calibrate` as a user meets them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from two_ranks import msn_launched

from msn_dist.config import dump_config
from msn_dist.launch import cli
from msn_dist.launch.cli import main
from msn_dist.planner import calibration, stopclock, tuning
from msn_dist.planner.machine import Machine, device_name, load_machine
from msn_dist.planner.plan_file import load_plan
from msn_dist.training.ranks import Ranks
from msn_dist.training.run_directory import RunDirectory
from msn_dist.training.tiny_step import tiny_step
from ranks import run_ranks
from tiny_data import config_of, write_data

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a config, and a topology of two CPU ranks."""
    folder = tmp_path_factory.mktemp("plans")
    write_data(folder / "data")
    training = {"device": "cpu", "log_every": 4}
    (folder / "config.yaml").write_text(dump_config(config_of(folder / "data", "msn_ffn", training=training)))
    (folder / "machine.json").write_text(cpu_of(2).model_dump_json())
    (folder / "topology.yaml").write_text(
        "name: two ranks\nmachine: machine.json\nranks_per_node: 2\ndevice_gib: 1\n"  # beside the topology
    )
    return folder


def cpu_of(ranks: int) -> Machine:
    tree = json.loads(load_machine("h200").model_dump_json())
    return Machine.model_validate(tree | {"name": device_name(torch.device("cpu")), "kind": "cpu", "ranks": ranks})


def msn(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code or 0


@pytest.fixture(scope="module")
def planned(folder: Path) -> Path:
    place = folder / "plan.json"
    command = ("plan", folder / "config.yaml", "--topology", folder / "topology.yaml", "--output", place)
    assert msn(*command) == 0
    return place


def test_a_plan_fits_80_columns_and_is_written(planned: Path, folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert msn("plan", folder / "config.yaml", "--topology", folder / "topology.yaml", "--zipf", "1.1") == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    for word in ("critical path", "may fill", "not chosen", "busiest owner", "Zipf 1.1"):
        assert word in printed
    assert load_plan(planned).world_size == 2


def test_the_command_that_trains_by_a_plan_is_printed_as_it_is_to_be_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    text = (folder / "topology.yaml").read_text().replace("two ranks", '"two [eu] ranks"')
    (folder / "named.yaml").write_text(text)
    place = tmp_path / "new" / "a plan[1].json"  # in a folder that is made
    assert msn("plan", folder / "config.yaml", "--topology", folder / "named.yaml", "--output", place) == 0
    printed = capsys.readouterr().out
    assert "two [eu] ranks" in printed
    command = next(line for line in printed.splitlines() if line.startswith("written to")).split(": ", 1)[1]
    assert shlex.split(command) == ["msn", "train", str(folder / "config.yaml"), "--plan", str(place), "--nproc", "2"]


def test_what_tune_finds_is_printed_as_a_plan_to_be_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(tuning, "_SCALES", {name: (1,) for name in tuning._SCALES} | {"sub_keys": (1, 2)})
    assert msn("plan", folder / "config.yaml", "--topology", folder / "topology.yaml", "--tune") == 0
    table, command = capsys.readouterr().out.split("the first as a plan: ")
    sub_keys, *_, milliseconds, _, _ = table.splitlines()[2].split()
    assert msn(*shlex.split(command)[1:]) == 0
    slots, of_step = f"{int(sub_keys) ** 2:,} slots", float(milliseconds)
    printed = capsys.readouterr().out
    assert slots in printed
    assert float(re.search(r"critical path +([\d.]+)", printed)[1]) == pytest.approx(of_step, rel=0.01)


@pytest.mark.parametrize("name", ["config.yaml", "topology.yaml", "profile.json"])
def test_a_plan_is_not_written_over_what_is_none(name: str, folder: Path, capsys: pytest.CaptureFixture) -> None:
    if name == "profile.json":
        (folder / name).write_text('{"copy_rate": {}}')
    before = (folder / name).read_text()
    command = ("plan", folder / "config.yaml", "--topology", folder / "topology.yaml", "--output", folder / name)
    assert msn(*command) == 2
    assert "is there and is no plan" in capsys.readouterr().err.replace("\n", " ")
    assert (folder / name).read_text() == before


@pytest.fixture(scope="module")
def run(folder: Path, planned: Path) -> tuple[str, RunDirectory]:
    """(what it printed, its directory) of a run on two ranks by the plan, whose id tables were moved by hand."""
    tree = json.loads(planned.read_text())
    tables = tree["id_tables"]["features.id_tables"]
    tables["user"] = {"sharding": "table_wise", "rank": 1}
    (folder / "moved.json").write_text(json.dumps(tree))
    command = ["train", "config.yaml", "--plan", "moved.json", "--nproc", "2", "--out", "run"]
    done = msn_launched(folder, command)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout, RunDirectory.open(folder / "run")


def test_a_run_lies_as_planned(run: tuple[str, RunDirectory]) -> None:
    _, directory = run
    plan = directory.planned()
    tables = {table["table"]: table for table in json.loads((directory.path / "plan.json").read_text())["tables"]}
    assert tables["user"]["rows_per_rank"] == [0, 40]
    assert tables["weight"]["sharding"] == plan.memory.strategy == directory.config().memory.strategy


def test_a_run_tells_how_its_steps_compare_with_the_plan(run: tuple[str, RunDirectory]) -> None:
    printed, directory = run
    lines = [line for line in printed.splitlines() if line.startswith("plan: ")]
    assert len(lines) == 1 and re.fullmatch(r"plan: [\d.]+ ms a step \([+-]\d+%\), took [\d.]+ ms", lines[0])
    forecast = directory.summary()["forecast"]
    assert forecast["seconds_planned"] == pytest.approx(directory.planned().seconds)
    assert forecast["seconds_measured"] > 0
    assert ">Plan<" in directory.report.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "plan.json"], "this run has 1 rank"),
        (["--plan", "plan.json", "memory.top_k=3"], "memory.top_k=4, and this run has 3"),
        (["--plan", "more.json", "--nproc", "2"], "has table 'more' in features.id_tables, which the model lacks"),
    ],
)
def test_a_plan_that_is_not_of_this_run_is_refused(
    arguments: list[str],
    message: str,
    folder: Path,
    planned: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(folder)
    more = json.loads(planned.read_text())
    more["id_tables"]["features.id_tables"]["more"] = {"sharding": "row_wise", "rank": None}
    (folder / "more.json").write_text(json.dumps(more))
    command = [sys.executable, "-m", "msn_dist.launch", "train", "config.yaml", *arguments, "--out", "refused"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (folder / "refused").exists()


def test_what_does_not_fit_ends_with_exit_code_3(folder: Path, capsys: pytest.CaptureFixture) -> None:
    command = ("plan", folder / "config.yaml", "--topology", folder / "topology.yaml", "--max-gib", "0.0003")
    assert msn(*command) == 3
    assert "does not fit" in capsys.readouterr().err


def test_a_popularity_is_given_once(folder: Path, capsys: pytest.CaptureFixture) -> None:
    command = ("plan", folder / "config.yaml", "--topology", folder / "topology.yaml")
    assert msn(*command, "--zipf", "1", "--usage", folder) == 2
    assert msn(*command, "--usage", folder) == 2
    assert "no memory_usage.json" in capsys.readouterr().err


def test_a_use_of_slots_that_cannot_be_is_refused_with_its_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    curve = {"share_of_slots": [0, 0.5, 0.4, 1], "share_of_hits": [0, 0.2, 0.5, 1]}
    (tmp_path / "memory_usage.json").write_text(json.dumps({"layer": {"rank_curve": curve}}))
    assert msn("plan", folder / "config.yaml", "--topology", folder / "topology.yaml", "--usage", tmp_path) == 2
    said = capsys.readouterr().err
    assert f"--usage {tmp_path}: memory_usage.json: rank_curve must hold" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("output", "message"), [("file/plan.json", "cannot be written"), (".", "is a folder; name a file in it")]
)
def test_where_a_plan_or_a_profile_cannot_go_is_said_first_and_nothing_is_left(
    output: str, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    place = tmp_path / output
    if output.startswith("file"):
        (tmp_path / "file").write_text("")
    before = sorted(tmp_path.iterdir())
    assert msn("plan", folder / "config.yaml", "--topology", folder / "topology.yaml", "--output", place) == 2
    assert msn("calibrate", "--device", "cpu", "--output", place) == 2
    said = capsys.readouterr()
    assert said.err.count(message) == 2 and not said.out
    assert sorted(tmp_path.iterdir()) == before


def test_a_plan_is_made_by_one_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(cli, "is_worker", lambda: True)
    monkeypatch.setattr(cli, "_fail", lambda code, explanation: sys.exit(f"{code}: {explanation}"))
    with pytest.raises(SystemExit, match="2: a plan is made by one process"):
        main(["plan", str(folder / "config.yaml"), "--topology", str(folder / "topology.yaml")])


def test_a_popularity_without_a_memory_is_refused(folder: Path, capsys: pytest.CaptureFixture) -> None:
    without = ("memory=null", "model.block=ffn", "model.memory_layers=null")
    assert msn("plan", folder / "config.yaml", *without, "--topology", folder / "topology.yaml", "--zipf", "1") == 2
    assert "this config has none" in capsys.readouterr().err


MOST_MEMORY = """
import re, sys
from msn_dist.launch import cli
from msn_dist.launch.cli import main
try:
    main(sys.argv[2:])
finally:  # not getrusage, which would count the process that forked this one
    open(sys.argv[1], "w").write(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def test_a_plan_for_512_gpus_takes_less_than_a_gib_of_memory(tmp_path: Path) -> None:
    command = ["plan", "configs/large/msn_2e34.yaml", "--topology", "configs/topology/h200x64x8.yaml"]
    command += ["--output", str(tmp_path / "plan.json")]
    printed = subprocess.run(
        [sys.executable, "-c", MOST_MEMORY, str(tmp_path / "kib"), *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert int((tmp_path / "kib").read_text()) < 2**20
    plan = load_plan(tmp_path / "plan.json")
    assert "msn_2e34.yaml --plan" in printed and printed.rstrip().endswith(
        "--out DIR"
    )  # as launch/torchrun.sh needs it
    assert plan.world_size == 512 and len(plan.id_tables["features.id_tables"]) == 26
    # 2 tables of 2^34 slots of 64 float32 numbers, and their state
    assert plan.storage["values"] == [2 * 2**34 * 64 * 4 // 512] * 512
    assert plan.storage["value state"] == [2 * 2**34 * 4 // 512] * 512


def measure(rank: int, world_size: int, name: str = "cpu") -> dict:
    device, group = torch.device(name), dist.group.WORLD
    stopclock._SECONDS, stopclock._ROUNDS, stopclock._TURNS = 0.0, 1, 1  # every round ends before its first call
    calibration._STRETCHES = 0.0
    calibration._TABLE_BYTES, calibration._BAGS = {device.type: 2**22}, {device.type: 64}
    tiny = partial(tiny_step, Ranks(rank, world_size, world_size, device, group, group))
    machine = calibration.calibrate(device, group, group, group, {"torch": torch.__version__}, tiny)
    clock = stopclock.Stopclock(device, group)
    dispatch = calibration._dispatch(clock, tiny, lambda line: None).model_dump()  # what a GPU's host has
    link = None
    if world_size > 1:  # as if every rank had a node of its own
        link = calibration.link_between_nodes(device, group, dist.new_subgroups(1)[0], group).model_dump()
    return json.loads(machine.model_dump_json()) | {"of a tiny step": dispatch, "between nodes": link}


def test_a_calibration_measures_every_line_and_is_the_same_on_all_ranks() -> None:
    trees = run_ranks(measure, 2)
    dispatches = [tree.pop("of a tiny step") for tree in trees]
    assert dispatches[0] == dispatches[1] and 1e-6 < dispatches[0]["operator"] < 1e-2
    links = [tree.pop("between nodes") for tree in trees]
    assert links[0] == links[1] and links[0]["bandwidth"] > 0
    machine = Machine.model_validate(trees[0])
    assert machine.kind == "cpu" and machine.ranks == 2
    lines = {name: value for name, value in vars(machine).items() if hasattr(value, "source")}
    assert all(value.source == "measured" for value in lines.values())
    assert machine.all_to_all.points and machine.all_reduce.points
    assert [seconds for seconds, _ in machine.straggling.points] == [0.001, 0.004, 0.016]
    assert {name for name in trees[0] if trees[0][name] != trees[1][name]} == set()


@pytest.mark.gpu
def test_a_gpu_is_calibrated_with_its_host() -> None:
    (tree,) = run_ranks(measure, 1, "cuda:0", backend="cpu:gloo,cuda:nccl")
    machine = Machine.model_validate({key: tree[key] for key in tree if key in Machine.model_fields})
    assert machine.kind == "cuda" and machine.retrieve is not None and machine.straggling is None
    assert 0 < machine.operator.seconds < machine.dispatch.operator < machine.dispatch.memory
    assert machine.dispatch.step > 0
