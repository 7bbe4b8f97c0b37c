"""python -m benchmarks.plan_accuracy: what `msn plan` says of a step, and what `msn train --plan` takes.

For every number of ranks the machine is calibrated anew; then every shape is planned, trained for 60 steps on the
planted set, and every config named here on KuaiRand, and compared: milliseconds of a step (from the 11th to the 50th,
the median of --rounds runs), and on a GPU the peak of its tensors, as planned for the fullest rank (without the margin)
and measured on the first.
Slots are expected to be hit as a first such run has counted them (`msn plan --usage`).

--strategies trains every other exact strategy as well, in turns, from the same plan with its strategy changed, and
tells how often the planner has the order of two right and how much slower the chosen one is than the fastest.

Writes benchmarks/results/plan_accuracy.csv, or plan_accuracy_cuda.csv; with --strategies plan_order.csv, or
plan_order_cuda.csv.  --ranks 1 2 4 are the numbers of ranks, --shapes 0 2 some of the shapes, --device cuda takes GPUs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from benchmarks.results import write_rows
from msn_dist.planner.plan_file import load_plan, write_plan

ROOT = Path(__file__).parent.parent
STEPS = 60
CLEAR = 0.1  # so much slower a median must be, and every run slower, for two strategies to be told apart
ROWS = {"cpu": 2048, "cuda": 8192}  # of a step: over all ranks of a CPU, which share its cores; on each GPU
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {
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
        "configs/demo.yaml": {},  # a file, as it is
        "configs/kuairand/dlrm.yaml": {},
    },
    "cuda": {
        "msn_ffn, 1024^2 slots of 256": {
            "model": {"backbone": "rankmixer", "tokens": 16, "width": 256, "layers": 4},
            "memory": {"sub_keys": 1024, "top_k": 32},
        },
        "msn_ffn, 4096^2 slots of 64 in bf16": {
            "model": {"backbone": "rankmixer", "tokens": 16, "width": 512, "layers": 2},
            "memory": {"sub_keys": 4096, "top_k": 32, "value_dim": 64, "value_dtype": "bf16"},
            "training": {"precision": "bf16"},
        },
        "dlrm, 2048^2 slots of 128": {
            "model": {"backbone": "dlrm", "hidden": [2048, 2048], "tokens": 16, "width": 128},
            "memory": {"sub_keys": 2048, "top_k": 32},
        },
        "msn_smoe, 512^2 slots of 128": {
            "model": {"backbone": "rankmixer", "block": "msn_smoe", "tokens": 16, "width": 128, "layers": 2},
            "memory": {"sub_keys": 512, "top_k": 32},
            "training": {"precision": "bf16"},
        },
    },
}


@dataclass(frozen=True)
class Place:
    """Where one number of ranks is planned for and trained."""

    folder: Path
    device: str
    ranks: int

    @property
    def topology(self) -> Path:
        return self.folder / f"{self.ranks}.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--device", choices=tuple(SHAPES), default="cpu")
    parser.add_argument("--shapes", type=int, nargs="+", help="numbers of shapes, from 0; all of them if left out")
    parser.add_argument("--strategies", action="store_true", help="train the strategies that were not chosen too")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each strategy, one after the other")
    parser.add_argument("--gib", type=float, default=4.0, help="that a rank may fill")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for data, profiles, plans and runs")
    chosen = parser.parse_args()
    shapes = list(SHAPES[chosen.device])
    if chosen.shapes is not None:
        shapes = [shapes[number] for number in chosen.shapes]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = chosen.keep or Path(name)
        folder.mkdir(exist_ok=True)
        most = ROWS[chosen.device] * (max(chosen.ranks) if chosen.device == "cuda" else 1)
        msn("prepare", "synthetic", str(folder / "data"), "--rows", str(2 * STEPS * most))
        if any(shape.endswith(".yaml") for shape in shapes):
            msn("prepare", "kuairand", str(folder / "kuairand"))
        for ranks in chosen.ranks:
            place = Place(folder, chosen.device, ranks)
            calibrated(place, chosen.gib)
            for shape in shapes:
                rows += compared(place, shape, chosen.strategies, chosen.rounds)
    name = "plan_order" if chosen.strategies else "plan_accuracy"
    write_rows(f"{name}{'_cuda' * (chosen.device == 'cuda')}.csv", rows)
    if chosen.strategies:
        print(order(rows))


def calibrated(place: Place, gib: float) -> None:
    """Write the topology of this machine."""
    profile = place.folder / f"{place.ranks}.json"
    begun = time.perf_counter()
    msn("calibrate", "--nproc", str(place.ranks), "--device", place.device, "--output", str(profile))
    print(f"{place.ranks} ranks calibrated in {time.perf_counter() - begun:.0f} s", flush=True)
    here = {"name": "here", "machine": str(profile), "ranks_per_node": place.ranks, "device_gib": gib}
    place.topology.write_text(yaml.safe_dump(here))


def compared(place: Place, shape: str, strategies: bool, rounds: int) -> Iterator[dict[str, Any]]:
    """Rows of the CSV: of the chosen strategy, and of the others that round no more if they are asked for."""
    config = config_file(place, shape)
    name = f"{place.ranks}-{list(SHAPES[place.device]).index(shape)}"
    plan, before = (place.folder / f"{name}{suffix}" for suffix in (".plan", ".before"))
    planning = ("plan", str(config), "--topology", str(place.topology), "--output", str(plan))
    msn(*planning)
    planned = load_plan(plan)
    if planned.memory is not None:
        trained(place, config, plan, before)
        msn(*planning, "--usage", str(before))
        planned = load_plan(plan)
    chosen = planned.memory.strategy if planned.memory is not None else "no memory"
    plans, expected = {chosen: plan}, {chosen: (planned.seconds, max(planned.allocated_W))}
    for rival in planned.rivals if strategies else ():
        if rival.rounds or rival.bytes > planned.capacity:
            continue
        strategy = rival.memory.strategy
        expected[strategy] = rival.seconds, rival.allocated
        plans[strategy] = plan.with_suffix(f".{strategy}.plan")
        write_plan(planned.model_copy(update={"memory": rival.memory}), plans[strategy])
    found: dict[str, list[dict[str, Any]]] = {strategy: [] for strategy in plans}
    for turn in range(rounds):
        for strategy, file in plans.items():
            found[strategy].append(trained(place, config, file, place.folder / f"{name}.{strategy}.{turn}.run"))
    for strategy, forecasts in found.items():
        yield row(place, shape, strategy, strategy == chosen, *expected[strategy], forecasts)


def config_file(place: Place, shape: str) -> Path:
    config = place.folder / "config.yaml"
    training = {"device": place.device, "max_steps": STEPS, "log_every": STEPS // 2}
    if shape.endswith(".yaml"):
        tree = yaml.safe_load((ROOT / shape).read_text())
        changes = {"data": {"path": str(place.folder / "kuairand")}, "training": training}
        config.write_text(yaml.safe_dump(tree | {part: tree.get(part, {}) | changes[part] for part in changes}))
        return config
    on_gpu = place.device == "cuda"
    tree = {
        "name": "accuracy",
        "output": str(place.folder / "runs"),
        "data": {
            "path": str(place.folder / "data"),
            "batch_size": ROWS[place.device] * (place.ranks if on_gpu else 1),
            "workers": 8 if on_gpu else 0,  # a GPU is faster than one reader
        },
    }
    parts = SHAPES[place.device][shape]
    config.write_text(yaml.safe_dump(tree | parts | {"training": training | parts.get("training", {})}))
    return config


def trained(place: Place, config: Path, plan: Path, run: Path) -> dict[str, Any]:
    """The forecast of a run's summary."""
    msn("train", str(config), "--plan", str(plan), "--nproc", str(place.ranks), "--out", str(run))
    return json.loads((run / "summary.json").read_text())["forecast"]


def row(
    place: Place,
    shape: str,
    strategy: str,
    chosen: bool,
    seconds: float,
    size: int,
    forecasts: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    planned, found = 1e3 * seconds, [1e3 * forecast["seconds_measured"] for forecast in forecasts]
    measured, peak = statistics.median(found), forecasts[0]["bytes_measured"]
    print(
        f"{place.ranks} ranks, {shape}, {strategy}: {planned:.1f} ms planned, {measured:.1f} measured "
        f"({min(found):.1f} to {max(found):.1f})",
        flush=True,
    )
    return {
        "shape": shape,
        "ranks": place.ranks,
        "strategy": strategy,
        "chosen": int(chosen),
        "planned_ms": planned,
        "measured_ms": measured,
        "difference": planned / measured - 1,
        "rounds": len(found),
        "least_ms": min(found),
        "most_ms": max(found),
        "planned_gib": size / 2**30,
        "measured_gib": peak / 2**30 if peak else "",
    }


def order(rows: Sequence[dict[str, Any]]) -> str:
    """How often the faster of two strategies is told, and what following the plan costs."""
    lines = []
    for place in dict.fromkeys((row["ranks"], row["shape"]) for row in rows):
        here = [row for row in rows if (row["ranks"], row["shape"]) == place]
        right, pairs = 0, 0
        for one, other in combinations(here, 2):
            slower, faster = sorted((one, other), key=lambda row: -row["measured_ms"])
            apart = slower["least_ms"] > faster["most_ms"]
            if apart and slower["measured_ms"] > (1 + CLEAR) * faster["measured_ms"]:
                pairs += 1
                right += slower["planned_ms"] > faster["planned_ms"]
        least = min(row["measured_ms"] for row in here)
        cost = next(row["measured_ms"] for row in here if row["chosen"]) / least - 1
        lines.append(
            f"{place[0]} ranks, {place[1]}: {right} of {pairs} pairs that differ clearly in the right order; "
            f"the chosen strategy is {cost:.0%} slower than the fastest"
        )
    return "\n".join(lines)


def msn(*arguments: str) -> None:
    """The command; its output is shown if it fails."""
    done = subprocess.run([sys.executable, "-m", "msn_dist.launch", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"msn {' '.join(arguments)}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()
