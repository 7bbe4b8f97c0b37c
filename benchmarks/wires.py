"""python -m benchmarks.wires: does training get worse when values and gradients travel in 16 or 8 bits?

configs/planted.yaml on two gloo ranks, every wire with the same seeds; `int8, nearest` is int8 without the random
rounding of gradients that the product uses.  Writes benchmarks/results/wires.csv (one row a run).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import socket
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from benchmarks import planted_runs
from benchmarks.results import write_rows
from msn_dist.config import load_config
from msn_dist.sharding import wire
from msn_dist.training import run

WIRES = ["fp32", "bf16", "fp16", "int8", "int8, nearest"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time, of two processes each")
    arguments = parser.parse_args()
    planted_runs.prepare()
    runs = list(product(WIRES, range(arguments.seeds)))
    with ThreadPoolExecutor(arguments.parallel) as pool:
        rows = list(pool.map(lambda one: _run(*one), runs))
    write_rows("wires.csv", rows)
    print("| wire | test AUC | logloss | bytes a step |\n|---|---|---|---|")
    for kind in WIRES:
        auc, logloss, sent = zip(
            *((row["test_auc"], row["test_logloss"], row["bytes_per_step"]) for row in rows if row["wire"] == kind),
            strict=True,
        )
        spread = f" ± {statistics.stdev(auc):.4f}" if len(auc) > 1 else ""
        print(f"| {kind} | {statistics.mean(auc):.4f}{spread} | {statistics.mean(logloss):.4f} | {sent[0]:,.0f} |")


def _run(kind: str, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
        probe.close()
        mp.spawn(_rank, (kind, seed, port, folder), nprocs=2)
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
        records = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    return {
        "wire": kind,
        "seed": seed,
        "valid_auc": summary["valid"]["auc"],
        "test_auc": summary["test"]["auc"],
        "test_logloss": summary["test"]["logloss"],
        "bytes_per_step": next(record["exchange"]["bytes_per_step"] for record in records if "exchange" in record),
    }


def _rank(rank: int, kind: str, seed: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    if kind == "int8, nearest":
        random = wire.ScaledByte
        wire.ScaledByte = lambda generator=None: random()
    overrides = [f"memory.wire={kind.split(',')[0]}", f"seed={seed}", "training.device=cpu"]
    with contextlib.redirect_stdout(io.StringIO()):
        run.train(load_config(planted_runs.CONFIG, overrides), Path(folder) / "run")


if __name__ == "__main__":
    main()
