"""python -m benchmarks.stabilisers: what keeps all slots of a memory in use, on the planted set.

Three stabilisers, each alone, all but each, none and all: LayerNorm on queries and keys, warm-up of the learning
rates, over-parameterized keys.  Everything else is configs/planted.yaml, learning rates included.  Writes
benchmarks/results/stabilisers.csv.
"""

from __future__ import annotations

from benchmarks import planted_runs
from benchmarks.results import markdown, write_rows

WITHOUT = {
    "LayerNorm": "memory.layer_norm=false",
    "warm-up": "optimizer.warmup_steps=0",
    "Theta": "memory.theta=none",
}
MEMORY = ("used_share", "window_used_share", "entropy_ratio", "kl_to_uniform", "top1pct_share")


def main() -> None:
    reachable = planted_runs.prepare()["valid"]["click"]["bayes"]
    rows = []
    for stabilisers in subsets():
        left_out = [override for name, override in WITHOUT.items() if name not in stabilisers]
        summary = planted_runs.summary_of(left_out)
        rows.append(
            {
                "stabilisers": " + ".join(stabilisers) or "none",
                **{key: summary["memory"][key] for key in MEMORY},
                "valid_auc": summary["valid"]["auc"],
                "valid_logloss": summary["valid"]["logloss"],
                "bayes_auc": reachable["auc"],
                "bayes_logloss": reachable["logloss"],
            }
        )
    write_rows("stabilisers.csv", rows)
    print(markdown(rows))


def subsets() -> list[tuple[str, ...]]:
    """Every choice of stabilisers, from none to all."""
    names = tuple(WITHOUT)
    return [(), *((name,) for name in names), *(tuple(n for n in names if n != name) for name in names), names]


if __name__ == "__main__":
    main()
