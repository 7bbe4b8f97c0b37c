"""python -m benchmarks.quality: every model of configs/kuairand on the same data, several seeds each.

A run that has finished is not repeated, so an interrupted benchmark goes on where it was.  Writes
benchmarks/results/quality.csv (one row a run) and prints the README's table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.results import write_rows

CONFIGS = Path(__file__).parents[1] / "configs" / "kuairand"
METRICS = ("auc", "gauc", "qauc", "logloss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--nproc", type=int, default=1, help="processes of one run")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="where run directories go")
    parser.add_argument("--models", nargs="*", default=sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    arguments = parser.parse_args()

    jobs = [(model, seed) for seed in range(arguments.seeds) for model in arguments.models]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        summaries = list(pool.map(lambda job: _run(*job, arguments.runs, arguments.nproc), jobs))
    rows = [
        {
            "model": model,
            "seed": seed,
            **{f"{split}_{metric}": summary[split][metric] for split in ("valid", "test") for metric in METRICS},
            "parameters": summary["parameters"]["total"],
            "activated": summary["parameters"]["activated"],
            "examples_per_second": summary["examples_per_second"],
        }
        for (model, seed), summary in zip(jobs, summaries, strict=True)
    ]
    write_rows("quality.csv", sorted(rows, key=lambda row: (row["model"], row["seed"])))
    print(_table(rows))


def _run(model: str, seed: int, runs: Path, nproc: int) -> dict[str, Any]:
    """The summary of one run, which is made if it is not there."""
    out = runs / f"{model}-{seed}"
    summary = out / "summary.json"
    if not summary.exists():
        command = [sys.executable, "-m", "msn_dist.launch", "train", str(CONFIGS / f"{model}.yaml"), f"seed={seed}"]
        result = subprocess.run(
            [*command, "--nproc", str(nproc), "--out", str(out)],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if result.returncode:
            sys.exit(f"{model}, seed {seed}: exit code {result.returncode}\n{result.stdout}{result.stderr}")
    content = json.loads(summary.read_text())
    print(f"{model:10} seed {seed}  test auc {content['test']['auc']:.4f}", flush=True)
    return content


def _table(rows: list[dict[str, Any]]) -> str:
    """Markdown; mean and sample standard deviation over seeds, the best test AUC first."""
    names = {row["model"] for row in rows}
    of = {name: [row for row in rows if row["model"] == name] for name in names}

    def cell(name: str, key: str) -> str:
        values = [row[key] for row in of[name]]
        deviation = f" ± {statistics.stdev(values):.4f}".replace("0.", ".", 1) if len(values) > 1 else ""
        return f"{statistics.mean(values):.4f}{deviation}".replace("0.", ".", 1)

    keys = ["test_auc", "test_gauc", "test_qauc", "test_logloss", "valid_auc"]
    lines = ["| model | " + " | ".join(keys) + " | parameters (activated) |", "|---" * (len(keys) + 2) + "|"]
    for name in sorted(names, key=lambda name: -statistics.mean(row["test_auc"] for row in of[name])):
        first = of[name][0]
        size = f"{first['parameters'] / 1e6:.2f} M ({first['activated'] / 1e6:.2f} M)"
        lines.append(f"| {name} | " + " | ".join(cell(name, key) for key in keys) + f" | {size} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
