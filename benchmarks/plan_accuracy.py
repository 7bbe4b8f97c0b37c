"""python -m benchmarks.plan_accuracy: what `msn plan` says of a step, and what `msn train --plan` takes.

For every number of ranks the machine is calibrated anew; then every shape is planned, trained for 60 steps on the
planted set, and compared: milliseconds of a step (from the 11th to the 50th), and on a GPU the peak of its memory.
Slots are expected to be hit as a first such run has counted them (`msn plan --usage`).

Writes benchmarks/results/plan_accuracy.csv.  --ranks 1 2 4 are the numbers of ranks, --device cuda takes GPUs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.results import write_rows

STEPS = 60
SHAPES: dict[str, dict[str, Any]] = {
    "msn_ffn, 256^2 slots of 64": {
        "model": {"backbone": "rankmixer", "tokens": 8, "width": 64, "layers": 2},
        "memory": {"sub_keys": 256, "top_k": 32},
    },
    "msn_ffn, 128^2 slots of 32": {
        "model": {"backbone": "rankmixer", "tokens": 4, "width": 32, "layers": 2},
        "memory": {"sub_keys": 128, "top_k": 16},
    },
    "dlrm, 512^2 slots of 64": {
        "model": {"backbone": "dlrm", "hidden": [400, 400], "tokens": 4, "width": 64},
        "memory": {"sub_keys": 512, "top_k": 16},
    },
    "msn_smoe, 64^2 slots of 64": {
        "model": {"backbone": "rankmixer", "block": "msn_smoe", "tokens": 4, "width": 64, "layers": 2},
        "memory": {"sub_keys": 64, "top_k": 8},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--gib", type=float, default=4.0, help="that a rank may fill")
    chosen = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        msn("prepare", "synthetic", str(folder / "data"), "--rows", str(2 * STEPS * 2048))
        for ranks in chosen.ranks:
            profile, topology = folder / f"{ranks}.json", folder / f"{ranks}.yaml"
            msn("calibrate", "--nproc", str(ranks), "--device", chosen.device, "--output", str(profile))
            here = {"name": "here", "machine": str(profile), "ranks_per_node": ranks, "device_gib": chosen.gib}
            topology.write_text(yaml.safe_dump(here))
            rows += [compare(folder, shape, ranks, chosen.device, topology) for shape in SHAPES]
    write_rows("plan_accuracy.csv", rows)


def compare(folder: Path, shape: str, ranks: int, device: str, topology: Path) -> dict[str, Any]:
    """A row of the CSV."""
    config = folder / "config.yaml"
    tree = {
        "name": "accuracy",
        "output": str(folder / "runs"),
        "data": {"path": str(folder / "data"), "batch_size": 2048},
        "training": {"device": device, "max_steps": STEPS, "log_every": STEPS // 2},
    }
    config.write_text(yaml.safe_dump(tree | SHAPES[shape]))
    place = folder / f"{ranks}-{list(SHAPES).index(shape)}"
    plan, before, run = (str(place.with_suffix(suffix)) for suffix in (".plan", ".before", ".run"))
    planning = ("plan", str(config), "--topology", str(topology), "--output", plan)
    training = ("train", str(config), "--plan", plan, "--nproc", str(ranks), "--out")
    msn(*planning)
    msn(*training, before)
    msn(*planning, "--usage", before)
    msn(*training, run)
    forecast = json.loads(Path(run, "summary.json").read_text())["forecast"]
    planned, measured = 1e3 * forecast["seconds_planned"], 1e3 * forecast["seconds_measured"]
    row = {
        "shape": shape,
        "ranks": ranks,
        "strategy": json.loads(Path(plan).read_text())["memory"]["strategy"],
        "planned_ms": planned,
        "measured_ms": measured,
        "difference": planned / measured - 1,
        "planned_gib": forecast["bytes_planned"] / 2**30,
        "measured_gib": forecast["bytes_measured"] / 2**30 if forecast["bytes_measured"] else "",
    }
    print(f"{ranks} ranks, {shape}: {planned:.1f} ms planned, {measured:.1f} measured", flush=True)
    return row


def msn(*arguments: str) -> None:
    """The command; its output is shown if it fails."""
    done = subprocess.run([sys.executable, "-m", "msn_dist.launch", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"msn {' '.join(arguments)}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()
