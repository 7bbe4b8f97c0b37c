"""python -m benchmarks.kernels: the Triton kernels and their peers on one CUDA GPU, checked before they are timed.

    retrieval   product-key retrieval, forward and with the backward   (benchmarks.kernel_retrieval)
    gather      Sparse-Gather, forward                                  (benchmarks.kernel_gather)
    update      forward, backward and row-wise Adagrad of the table     (benchmarks.kernel_update)

Peers are torch eager, torch.compile, FBGEMM's TBE and RAFT's select_k, which stands for AirTopK: it has no binding for
Python, so benchmarks/airtopk/build.sh builds it with nvcc, and says how; --airtopk names a library that lies elsewhere.
A peer that is missing or fails is skipped with its reason.

Every result is compared with kernels/reference.py first.  A wrong one is reported and not timed, and the exit code is 1
at the end.  Times are medians with p20 and p80 of the device, all providers of a shape in one run, beside what a large
copy, a large sum and a large matrix product reach at the start of it.

Writes benchmarks/results/kernels.csv and kernels.svg after about four minutes, whatever failed on the way.  --quick (a
few shapes, one minute) and --only (one part) write nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from functools import partial
from pathlib import Path

import torch

from benchmarks import kernel_gather, kernel_retrieval, kernel_update
from benchmarks.kernel_airtopk import DEFAULT_PATH
from benchmarks.kernel_plot import draw
from benchmarks.kernel_timing import Bench, Peaks, release
from benchmarks.results import device, write_rows

FULL, QUICK = (80, 200.0), (25, 45.0)  # ms of timing a provider, and s after which peers are skipped


def main() -> int:
    """The exit code: 1 after a wrong result or a part that broke off, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("retrieval", "gather", "update"), help="one part; nothing is written")
    parser.add_argument("--quick", action="store_true", help="a few shapes; nothing is written")
    parser.add_argument("--airtopk", type=Path, default=DEFAULT_PATH, metavar="PATH", help="RAFT's library")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.kernels needs a CUDA GPU, and there is none here: nothing was measured", file=sys.stderr)
        return 2
    bench = Bench(Peaks.measured(), *(QUICK if chosen.quick else FULL))
    print(f"{device()}: {bench.peaks}", flush=True)
    parts = {
        "retrieval": partial(kernel_retrieval.run, airtopk=chosen.airtopk),
        "gather": kernel_gather.run,
        "update": kernel_update.run,
    }
    for name, run in parts.items():
        if chosen.only not in (None, name):
            continue
        try:
            run(bench, chosen.quick)
        except Exception as error:  # the other parts and the CSV are worth having
            bench.wrong.append(f"{name} broke off: {type(error).__name__}: {error}")
            print(bench.wrong[-1], flush=True)
        release()
    if not (chosen.quick or chosen.only):
        with contextlib.redirect_stdout(None):  # rows have been printed as they came
            path = write_rows("kernels.csv", bench.rows)
        print(f"written to {path} and {draw(path)}")
    for problem in bench.wrong:
        print(f"WRONG: {problem}", file=sys.stderr)
    return 1 if bench.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
