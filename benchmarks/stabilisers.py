"""python -m benchmarks.stabilisers: what keeps all slots of a memory in use, on the planted set.

Three stabilisers, none, each alone, all but each, and all: LayerNorm on queries and keys, warm-up of the learning
rates, over-parameterized keys.  Everything else is configs/planted.yaml, learning rates included.  Writes
benchmarks/results/stabilisers.csv and prints the README's table.
"""

from __future__ import annotations

from typing import Any

from benchmarks import planted_runs
from benchmarks.results import write_rows

WITHOUT = {
    "LayerNorm": "memory.layer_norm=false",
    "warm-up": "optimizer.warmup_steps=0",
    "Theta": "memory.theta=none",
}
MEMORY = ("used_share", "window_used_share", "entropy_ratio", "kl_to_uniform", "top1pct_share")


def main() -> None:
    bayes = planted_runs.prepare()["valid"]["click"]["bayes"]
    rows = []
    for stabilisers in subsets():
        summary = planted_runs.summary_of([off for name, off in WITHOUT.items() if name not in stabilisers])
        rows.append(
            {
                "stabilisers": " + ".join(stabilisers) or "none",
                **{key: summary["memory"][key] for key in MEMORY},
                "valid_auc": summary["valid"]["auc"],
                "valid_logloss": summary["valid"]["logloss"],
                "bayes_auc": bayes["auc"],
                "bayes_logloss": bayes["logloss"],
            }
        )
    write_rows("stabilisers.csv", rows)
    print(_table(rows))


def subsets() -> list[tuple[str, ...]]:
    """None, each alone, all but each, all."""
    names = tuple(WITHOUT)
    return [(), *((name,) for name in names), *(tuple(n for n in names if n != name) for name in names), names]


def _table(rows: list[dict[str, Any]]) -> str:
    """Markdown; "lately" is the last logging interval of a run."""
    lines = [
        "| stabilisers | slots ever used | used lately | entropy / log n | KL to uniform | hits on top 1 % "
        "| valid AUC | valid logloss |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        ever, lately, entropy, kl, top = (row[key] for key in MEMORY)
        lines.append(
            f"| {row['stabilisers']} | {ever:.1%} | {lately:.1%} | {entropy:.2f} | {kl:.2f} | {top:.1%} "
            f"| {row['valid_auc']:.4f} | {row['valid_logloss']:.4f} |"
        )
    best = f"| Bayes-optimal | | | | | | {rows[0]['bayes_auc']:.4f} | {rows[0]['bayes_logloss']:.4f} |"
    return "\n".join([*lines, best])


if __name__ == "__main__":
    main()
