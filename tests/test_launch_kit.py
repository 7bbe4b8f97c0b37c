"""The launch kit for many nodes, as far as one machine can check it: each node is an agent on loopback."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from msn_dist.config import dump_config
from tiny_data import config_of, write_data

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
BAD_CONFIG = "bad.yaml: memory.sub_kys: unknown key; did you mean 'sub_keys'?"
SBATCH_OPTIONS = set(
    "account array chdir comment constraint cpus-per-gpu cpus-per-task dependency error exclude exclusive export "
    "gpus gpus-per-node gpus-per-task gres job-name kill-on-invalid-dep mail-type mem mem-per-cpu mem-per-gpu "
    "no-kill no-requeue nodelist nodes ntasks ntasks-per-node open-mode output partition qos requeue reservation "
    "signal switches time wckey".split()
)
SRUN_OPTIONS = SBATCH_OPTIONS | {"kill-on-bad-exit", "label", "wait"}
# Runs the command once a node, as srun would, and notes its own options; exits with the highest code.
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do echo "$1" >> "$RECORD"; shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & pids+=($!); done
highest=0
for pid in "${pids[@]}"; do
    code=0; wait "$pid" || code=$?
    ((code > highest)) && highest=$code
done
exit "$highest"
"""
SCONTROL = """#!/usr/bin/env bash
[[ "$*" == "show hostnames gpu[07-08]" ]] && printf '127.0.0.1\\ngpu08\\n'
"""


class End(NamedTuple):
    code: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all nodes see: data, a good and a bad config."""
    shared = tmp_path_factory.mktemp("shared")
    write_data(shared / "data")
    good = dump_config(config_of(shared / "data", "msn_ffn"))
    (shared / "good.yaml").write_text(good)
    (shared / "bad.yaml").write_text(good.replace("sub_keys:", "sub_kys:"))
    return shared


def environment(**variables: str) -> dict[str, str]:
    """What every process has, on any node; nothing of what a launcher around this test has set."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
    return kept | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | variables


def at_once(*starts: tuple[list[str], dict[str, str]]) -> list[End]:
    """Run these commands, each with its environment, beside each other."""
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command, env in starts
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [End(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def train_on_two_nodes(config: Path, out: Path) -> list[End]:
    nodes = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = ["launch/torchrun.sh", "train", str(config), "seed=7", "--out", str(out)]
    return at_once(*((command, environment(NODE_RANK=str(rank), **nodes)) for rank in range(2)))


def test_two_torchrun_agents_make_one_run_and_node_0_prints_it(shared: Path) -> None:
    first, second = train_on_two_nodes(shared / "good.yaml", shared / "run")
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    summary = json.loads((shared / "run" / "summary.json").read_text())
    assert (summary["world_size"], summary["steps"], summary["seed"]) == (2, 6, 7)
    (zero_to_zero, zero_to_one), _ = summary["bytes_between_ranks"]
    assert zero_to_zero == 0 < zero_to_one
    assert first.stdout.startswith("node 0 of 2, ") and "msn_ffn: 6 steps" in first.stdout
    assert second.stdout.startswith("node 1 of 2, ") and len(second.stdout.splitlines()) == 1


def test_bad_input_ends_every_agent_with_exit_code_2_and_the_message(shared: Path) -> None:
    for end in train_on_two_nodes(shared / "bad.yaml", shared / "refused"):
        assert end.code == 2, end.stderr
        assert BAD_CONFIG in end.stderr
        assert "Traceback" not in end.stderr
    assert not (shared / "refused").exists()


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"NNODES": ""}, "train c --out d", "NNODES is not set"),
        ({"NODE_RANK": ""}, "train c --out d", "NODE_RANK is not set"),
        ({"MASTER_ADDR": ""}, "train c --out d", "MASTER_ADDR is not set"),
        ({"NPROC_PER_NODE": ""}, "train c --out d", "NPROC_PER_NODE is not set"),
        ({"NNODES": "$(PET_NNODES)"}, "train c --out d", "NNODES=$(PET_NNODES) is not a positive whole number"),
        ({"NPROC_PER_NODE": "0"}, "train c --out d", "NPROC_PER_NODE=0 is not a positive whole number"),
        ({"NODE_RANK": "2"}, "train c --out d", "NODE_RANK=2 is not between 0 and NNODES - 1 = 1"),
        ({}, "train c seed=3", "train needs --out DIR"),
        ({}, "", "no command"),
    ],
)
def test_what_an_agent_needs_is_asked_for(change: dict[str, str], arguments: str, message: str) -> None:
    nodes = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "NODE_RANK": "0"}
    (end,) = at_once((["launch/torchrun.sh", *arguments.split()], environment(**nodes | change)))
    assert end.code == 2
    assert end.stderr.startswith(f"launch/torchrun.sh: {message}") and end.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch"])
def test_a_script_is_valid_bash(script: str) -> None:
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)


def test_slurm_options_are_known_and_come_before_the_first_command() -> None:
    head, body = re.match(r"((?:#.*\n)+)(.*)", (LAUNCH / "slurm.sbatch").read_text(), re.DOTALL).groups()
    options = re.findall(r"^#SBATCH --([a-z-]+)(?:=\S+)?$", head, re.MULTILINE)
    assert len(options) == (head + body).count("\n#SBATCH") and "\n#SBATCH" not in body
    assert set(options) <= SBATCH_OPTIONS
    assert {"nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "no-requeue"} <= set(options)


def submit(folder: Path, *arguments: str, **variables: str) -> End:
    """Run the batch script as Slurm does: a copy of it, in a job of two nodes of one GPU."""
    (folder / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    job = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "RECORD": str(folder / "options"),
        "MASTER_PORT": free_port(),
        "SLURM_JOB_ID": "17",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "gpu[07-08]",
        "SLURM_CPUS_PER_TASK": "4",
        "SLURM_GPUS_ON_NODE": "1",
    }
    script = shutil.copy(LAUNCH / "slurm.sbatch", folder / "slurm_script")
    (end,) = at_once((["bash", str(script), *arguments], environment(**job | variables)))
    return end


def test_a_slurm_job_makes_one_run_of_its_nodes(shared: Path, tmp_path: Path) -> None:
    out = tmp_path / "two words"  # arguments arrive as they were given
    end = submit(tmp_path, "train", str(shared / "good.yaml"), "--out", str(out))
    assert end.code == 0, end.stderr
    assert json.loads((out / "summary.json").read_text())["world_size"] == 2
    assert sorted(re.findall(r"node (\d) of 2, .*: 1 processes, meeting at 127\.0\.0\.1:", end.stdout)) == ["0", "1"]
    options = dict(
        re.fullmatch(r"--([a-z-]+)=?(\S*)", line).groups() for line in (tmp_path / "options").read_text().split()
    )
    assert set(options) <= SRUN_OPTIONS
    assert options["nodes"] == "2" and options["ntasks-per-node"] == "1" and options["cpus-per-task"] == "4"
    assert options["kill-on-bad-exit"] == "0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SLURM_JOB_ID": ""}, "this is no Slurm job"),
        ({"SLURM_SUBMIT_DIR": "/nowhere"}, "/nowhere/launch/torchrun.sh does not exist; submit from the checkout"),
        ({"SLURM_GPUS_ON_NODE": ""}, "the job has no GPUs"),
    ],
)
def test_a_slurm_job_that_cannot_run_says_why(change: dict[str, str], message: str, tmp_path: Path) -> None:
    end = submit(tmp_path, "train", "c", "--out", "d", **change)
    assert end.code == 2
    assert end.stderr.startswith(f"launch/slurm.sbatch: {message}") and end.stderr.count("\n") == 1


def kubernetes(name: str) -> dict[str, dict]:
    """kind -> document."""
    documents = yaml.safe_load_all((LAUNCH / "kubernetes" / name).read_text())
    return {document["kind"]: document for document in documents}


def pods(objects: dict[str, dict]) -> list[tuple[dict, dict[str, str]]]:
    """(pod's specification, environment of its container) of each node, in order, as the training operator makes them.

    Source: pkg/controller.v1/pytorch/envvar.go and master.go of kubeflow/training-operator 1.9.
    """
    job, settings = objects["PyTorchJob"], objects["ConfigMap"]["data"]
    replicas = job["spec"]["pytorchReplicaSpecs"]
    nodes = [role for role in ("Master", "Worker") for _ in range(replicas[role]["replicas"])]
    each = {
        "MASTER_ADDR": f"{job['metadata']['name']}-master-0",
        "MASTER_PORT": "23456",
        "WORLD_SIZE": str(len(nodes) * int(job["spec"]["nprocPerNode"])),
        "PET_NNODES": str(len(nodes)),
        "PET_NPROC_PER_NODE": job["spec"]["nprocPerNode"],
    }
    return [
        (replicas[role]["template"]["spec"], settings | each | {"RANK": str(rank), "PET_NODE_RANK": str(rank)})
        for rank, role in enumerate(nodes)
    ]


def command_of(pod: dict, variables: dict[str, str]) -> list[str]:
    """What the kubelet starts; a variable that is not known stays as it is."""
    (container,) = pod["containers"]
    words = [*container["command"], *container["args"]]
    return [re.sub(r"\$\((\w+)\)", lambda name: variables.get(name[1], name[0]), word) for word in words]


def test_a_kubernetes_job_is_complete() -> None:
    objects, storage = kubernetes("pytorchjob.yaml"), kubernetes("storage.yaml")
    job = objects["PyTorchJob"]
    assert (job["apiVersion"], objects["ConfigMap"]["apiVersion"]) == ("kubeflow.org/v1", "v1")
    assert job["spec"]["runPolicy"] == {"cleanPodPolicy": "None"}
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"} and replicas["Master"]["replicas"] == 1
    assert all(replica["restartPolicy"] == "Never" for replica in replicas.values())
    assert all(type(value) is str for value in objects["ConfigMap"]["data"].values())
    claim = storage["PersistentVolumeClaim"]
    assert claim["apiVersion"] == "v1" and claim["spec"]["accessModes"] == ["ReadWriteMany"]

    for pod, variables in pods(objects):
        (container,) = pod["containers"]
        assert container["name"] == "pytorch" and container["image"]
        assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == job["spec"]["nprocPerNode"]
        assert container["envFrom"] == [{"configMapRef": {"name": objects["ConfigMap"]["metadata"]["name"]}}]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes.pop(mount["name"]) for mount in container["volumeMounts"]}
        assert not volumes, "a volume that is not mounted"
        assert mounts["/shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        command = command_of(pod, variables)
        assert not any("$(" in word for word in command), command
        assert all(variables[name].startswith("/shared/") for name in ("CONFIG", "OUT"))


def test_the_image_holds_what_a_pod_starts() -> None:
    steps = [line.split() for line in (LAUNCH / "kubernetes" / "Dockerfile").read_text().splitlines()]
    copied = {source for step in steps if step[:1] == ["COPY"] for source in step[1:-1]}
    assert {"setup.cfg", "msn_dist", "kernels", "launch"} <= copied
    assert all((ROOT / source).exists() for source in copied)
    assert "launch/torchrun.sh" in command_of(*pods(kubernetes("pytorchjob.yaml"))[0])


def test_the_pods_of_a_kubernetes_job_join_and_pass_on_the_exit_code(shared: Path, tmp_path: Path) -> None:
    objects = kubernetes("pytorchjob.yaml")
    objects["PyTorchJob"]["spec"]["nprocPerNode"] = "1"
    objects["ConfigMap"]["data"] |= {"CONFIG": str(shared / "bad.yaml"), "OUT": str(tmp_path / "run")}
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    starts = [(command_of(pod, variables), environment(**variables | here)) for pod, variables in pods(objects)]
    assert len(starts) == 2
    for rank, end in enumerate(at_once(*starts)):
        assert end.code == 2, end.stderr
        assert BAD_CONFIG in end.stderr
        assert end.stdout.startswith(f"node {rank} of 2, ")
