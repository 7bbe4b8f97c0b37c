"""python -m benchmarks.planted: models with and without a memory on the planted set, at a similar number of
activated parameters and the same rows seen.

Every model gets the same three learning rates; the best one on valid is then repeated with other seeds.  Writes
benchmarks/results/planted.csv (one row a run).
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from benchmarks import planted_runs
from benchmarks.results import write_rows

MODELS = {
    "MSN-FFN": [],
    "FFN": ["memory=null", "model.block=ffn", "model.ffn_ratio=2.6"],
    "SMoE 2 in 4": ["memory=null", "model.block=smoe", "model.experts=4", "model.ffn_ratio=1.25"],
    "DLRM": ["memory=null", "model={backbone: dlrm, hidden: [120, 120]}"],
    "DCNv2": ["memory=null", "model={backbone: dcnv2, cross_layers: 2, hidden: [90, 90]}"],
    "DLRM, wide": ["memory=null", "model={backbone: dlrm, hidden: [400, 400, 400]}"],
}
LEARNING_RATES = (0.006, 0.02, 0.06)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    bayes_auc = planted_runs.prepare()["test"]["click"]["bayes"]["auc"]
    runs = []
    for model, overrides in MODELS.items():
        tried = [_run(model, overrides, lr, 0, bayes_auc) for lr in LEARNING_RATES]
        best = max(tried, key=lambda row: row["valid_auc"])["dense_lr"]
        runs += tried + [_run(model, overrides, best, seed, bayes_auc) for seed in range(1, seeds)]
    write_rows("planted.csv", runs)
    print(_table(runs))


def _run(model: str, overrides: list[str], lr: float, seed: int, bayes_auc: float) -> dict[str, Any]:
    summary = planted_runs.summary_of([*overrides, f"optimizer.dense.lr={lr}", f"seed={seed}"])
    return {
        "model": model,
        "dense_lr": lr,
        "seed": seed,
        "valid_auc": summary["valid"]["auc"],
        "test_auc": summary["test"]["auc"],
        "test_logloss": summary["test"]["logloss"],
        "bayes_test_auc": bayes_auc,
        "activated": summary["parameters"]["activated"],
        "parameters": summary["parameters"]["total"],
    }


def _table(runs: list[dict[str, Any]]) -> str:
    """Markdown: each model at its best learning rate on valid, mean and sample standard deviation over seeds."""
    lines = ["| model | learning rate | test AUC | test logloss | activated parameters |", "|---|---|---|---|---|"]
    for model in MODELS:
        best = max((run for run in runs if run["model"] == model), key=lambda run: (run["seed"] == 0, run["valid_auc"]))
        seeds = [run for run in runs if run["model"] == model and run["dense_lr"] == best["dense_lr"]]
        auc, logloss = ([run[key] for run in seeds] for key in ("test_auc", "test_logloss"))
        spread = f" ± {statistics.stdev(auc):.4f}" if len(auc) > 1 else ""
        lines.append(
            f"| {model} | {best['dense_lr']} | {statistics.mean(auc):.4f}{spread} | {statistics.mean(logloss):.4f} "
            f"| {best['activated']:,} |"
        )
    return "\n".join([*lines, f"| Bayes-optimal | | {runs[0]['bayes_test_auc']:.4f} | | |"])


if __name__ == "__main__":
    main()
