"""The command line, several processes from one command, and the doctor."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from msn_dist.errors import InputError
from msn_dist.launch import processes
from msn_dist.launch.cli import main
from msn_dist.launch.doctor import Facts, diagnose
from msn_dist.launch.versions import NEWEST, TRIPLES, pip_steps

ROOT = Path(__file__).parent.parent
CPU = Facts(
    python="3.11.7",
    torch="2.13.0+cpu",
    torchrec="1.8.0",
    fbgemm={"fbgemm-gpu-cpu": "1.8.0"},
    triton=None,
    cores=2,
    driver=None,
    gloo=True,
)
GPU = replace(
    CPU,
    torch="2.11.0+cu130",
    torchrec="1.6.1",
    fbgemm={"fbgemm-gpu": "1.6.0"},
    driver="580.1",
    cuda="13.0",
    nccl=(2, 28, 9),
    gpus=["H200", "H200"],
)


def problems(facts: Facts) -> dict[str, str]:
    return {finding.name: finding.problem for finding in diagnose(facts) if finding.problem}


def repair_of(name: str, facts: Facts) -> str:
    return next(finding.repair for finding in diagnose(facts) if finding.name == name)


def value_of(name: str, facts: Facts) -> str:
    return next(finding.value for finding in diagnose(facts) if finding.name == name)


def run(*command: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return stop.value.code


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("name: tiny\ndata: {path: nowhere}\nmemory: {}\ntraining: {device: cpu}\n")
    return path


def test_a_matching_triple_is_healthy_on_cpu_and_gpu() -> None:
    assert problems(CPU) == {}
    assert problems(GPU) == {}


@pytest.mark.parametrize("facts", [CPU, GPU])
def test_a_missing_library_is_reported_with_the_command_that_installs_it(facts: Facts) -> None:
    broken = replace(facts, torch=None, torchrec=None, fbgemm={}, errors={"torch": "No module named 'torch'"})
    assert set(problems(broken)) >= {"torch", "fbgemm", "torchrec"}
    command = repair_of("torch", broken)
    steps = ["install " + " ".join(step) for step in pip_steps(NEWEST, cuda=facts is GPU)]
    assert [part.split(" pip ")[1] for part in command.split(" && ")] == steps


def test_versions_that_do_not_match_are_reported_with_the_version_that_does() -> None:
    old = replace(CPU, fbgemm={"fbgemm-gpu-cpu": "1.6.0"}, errors={"fbgemm": "OSError: undefined symbol: _ZN3c10"})
    assert problems(old) == {"fbgemm": "torch 2.13.0 needs 1.8.0; OSError: undefined symbol: _ZN3c10"}
    assert "uninstall --yes fbgemm-gpu-cpu" in repair_of("fbgemm", old)
    assert "fbgemm-gpu-cpu==1.8.0" in repair_of("fbgemm", old)
    assert problems(replace(GPU, torchrec="1.8.0")) == {"torchrec": "torch 2.11.0 needs 1.6.1"}
    assert "2.11, 2.12, 2.13 are" in problems(replace(CPU, torch="2.9.1"))["torch"]


def test_builds_for_another_machine_are_reported() -> None:
    assert set(problems(replace(GPU, torch="2.11.0+cpu", cuda=None, fbgemm={"fbgemm-gpu-cpu": "1.6.0"}))) == {
        "torch",
        "fbgemm",
    }
    both = replace(CPU, fbgemm={"fbgemm-gpu": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"})
    assert "overwrite" in problems(both)["fbgemm"]


def test_doctor_tells_what_the_machine_runs() -> None:
    assert value_of("this machine runs", CPU) == "CPU ranks on 2 cores"
    assert value_of("this machine runs", GPU) == "2 GPU ranks (2 x H200), CPU ranks on 2 cores"
    assert "sharing one needs NCCL 2.30" in value_of("NCCL", GPU)
    assert "NCCL_MULTI_RANK_GPU_ENABLE=1" in value_of("NCCL", replace(GPU, nccl=(2, 30, 3)))


def test_doctor_is_happy_here(capsys: pytest.CaptureFixture) -> None:
    assert exit_code("doctor") == 0, capsys.readouterr().out


def test_setup_cfg_names_every_package_and_the_pinned_triple() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("msn_dist/**/__init__.py")}
    mapped = {f"msn_dist.{'.'.join(p.parent.relative_to(ROOT).parts)}" for p in ROOT.glob("kernels/**/__init__.py")}
    assert set(setup["options"]["packages"].split()) == found | mapped | {"msn_dist.launch"}
    for extra in ("cpu", "cuda"):
        steps = pip_steps(TRIPLES["2.13"], cuda=extra == "cuda")
        by_hand = {line.replace(" ", "") for line in setup["options.extras_require"][extra].strip().splitlines()}
        assert by_hand == {name for step in steps for name in step if step[0] != "--no-deps"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], "missing.yaml: cannot read this file"),
        (["{config}", "memory.sub_kys=64"], "memory.sub_kys: unknown key; did you mean 'sub_keys'?"),
        (["{config}", "--nproc", "0"], "--nproc 0: at least 1 process is needed"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: list[str], message: str, config: Path, capsys: pytest.CaptureFixture
) -> None:
    assert exit_code("train", *(argument.format(config=config) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_nproc_inside_torchrun_is_refused(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    result = run("-m", "msn_dist.launch", "train", str(config), "--nproc", "2")
    assert result.returncode == 2
    assert "torchrun has started 4 processes" in result.stderr


def test_processes_default_to_the_gpus_and_never_exceed_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_gpu_count", lambda: 2)
    assert processes.choose_nproc(None, "auto") == 2
    assert processes.choose_nproc(None, "cpu") == 1
    assert processes.choose_nproc(8, "cpu") == 8
    with pytest.raises(InputError, match="this machine has 2 GPUs"):
        processes.choose_nproc(3, "auto")
    monkeypatch.setattr(processes, "_gpu_count", lambda: 0)
    assert processes.choose_nproc(3, "auto") == 3
    with pytest.raises(InputError, match="sees no GPU"):
        processes.choose_nproc(None, "cuda")


def test_the_command_line_starts_without_heavy_libraries() -> None:
    heavy = "{'torch', 'torchrec', 'pyarrow', 'matplotlib', 'pydantic'}"
    result = run("-c", f"import sys, msn_dist.launch.cli; print(sorted({heavy} & set(sys.modules)))")
    assert result.stdout.strip() == "[]", result.stderr


def test_bad_input_on_one_of_two_ranks_is_explained_once_with_exit_code_2() -> None:
    result = run("tests/launched.py", "bad_input")
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines() == ["column 'age' is missing"]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert sorted(result.stdout.splitlines()) == [f"rank {rank} of 2, OMP_NUM_THREADS={threads}" for rank in (0, 1)]


def test_a_crash_on_one_of_two_ranks_shows_its_traceback_once_with_exit_code_1() -> None:
    result = run("tests/launched.py", "crash")
    assert result.returncode == 1, result.stderr
    assert result.stderr.count("Traceback") == 1
    assert result.stderr.splitlines()[-1] == "KeyError: 'boom'"


def test_a_rank_that_is_killed_ends_the_others_and_is_named() -> None:
    result = run("tests/launched.py", "killed")
    assert result.returncode == 1
    assert "rank 1 was ended by SIGKILL; is the machine out of memory?" in result.stderr.splitlines()
