"""python -m benchmarks.step: one whole training step of the paper-sized model, with and without its memory.

Batch 2,048, 16 tokens of width 1,024, 4 layers (hidden width 2,048), bf16 autocast, on one GPU; the MSN blocks have
memory on 2 layers, 256^2 slots of width 1,024 (or 128) each, of which a token reads 32.  benchmarks.step_models says
what a step is and what is compiled, benchmarks.step_profile how it is measured.

Before anything is timed, the output of MSN-FFN is compared with that of the same model on the reference back ends; if
it differs, that is all, and the exit code is 1.  Then every variant, eager and compiled:

    time      p50 of 30 steps, and p20 to p80; its ratio to FFN in the same mode; TFLOP/s of its matrix products
    memory    peak of a step, beside what must be kept: weights, optimizer state, gradients, saved activations
    ranges    kernel time by the named ranges of a step; what a range holds is not counted in those around it

Compiled layers have no ranges in them: theirs is "other forward".

Writes benchmarks/results/step.csv.  --quick (FFN and MSN-FFN) writes nothing.  --trace FOLDER keeps a Chrome trace of
three steps of each.  A variant that fails is left out, told at the end, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msn_dist.training.quiet import quiet_libraries

quiet_libraries()  # before torchrec is imported below

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.kernel_timing import release  # noqa: E402
from benchmarks.results import device, write_rows  # noqa: E402
from benchmarks.step_models import RANGES, Size, Trainee, Variant  # noqa: E402
from benchmarks.step_profile import OUTSIDE, step_flops, step_memory, step_times, trace_steps  # noqa: E402
from msn_dist.config import TrainingConfig  # noqa: E402
from msn_dist.training.ranks import Ranks, joined_ranks  # noqa: E402

WARMUP, STEPS, TRACED = 5, 30, 3
EAGER, COMPILED = "eager", "compiled"
REFERENCE = {"lookup": "reference", "retrieval": "reference"}
ERROR = 2**-8  # of the norm of the logits' differences over that of the logits: what a rounding to bf16 may do to one

Row = dict[str, Any]


def variants(quick: bool = False) -> list[Variant]:
    """In the order in which they are measured; FFN, to which the others are compared, comes first."""
    if quick:
        return [Variant("ffn"), Variant("msn_ffn", "fp32")]
    msn = [("msn_ffn", "fp32"), ("msn_ffn", "bf16"), ("msn_ffn", "bf16", 128), ("msn_smoe", "bf16")]
    return [Variant("ffn"), Variant("gated_ffn"), Variant("smoe"), *(Variant(*names) for names in msn)]


def main() -> int:
    """The exit code: 1 after a wrong output or a variant that failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="FFN and MSN-FFN; nothing is written")
    parser.add_argument("--trace", type=Path, metavar="FOLDER", help="for Chrome traces of three steps")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.step needs a CUDA GPU, and there is none here: nothing was measured", file=sys.stderr)
        return 2
    with joined_ranks(TrainingConfig(device="cuda")) as ranks, tempfile.TemporaryDirectory() as scratch:
        traces = chosen.trace or Path(scratch)
        traces.mkdir(parents=True, exist_ok=True)
        for variant in variants(chosen.quick):
            if variant.block == "msn_ffn" and (problem := wrong_output(Size(), variant, ranks)):
                print(f"WRONG, nothing was timed: {problem}", file=sys.stderr)
                return 1
        rows, failed = measure_all(Size(), variants(chosen.quick), ranks, "inductor", traces)
    for mode in (EAGER, COMPILED):
        Console(width=120).print(table(mode, rows))
    if rows and not chosen.quick:
        with contextlib.redirect_stdout(None):  # the tables have said it
            path = write_rows("step.csv", rows)
        print(f"written to {path}")
    for problem in failed:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if failed else 0


def wrong_output(size: Size, variant: Variant, ranks: Ranks, **back_ends: str) -> str | None:
    """What is wrong with the first output of a variant with memory; `back_ends` are those to check, if not auto."""
    logits = []
    for settings in (REFERENCE, back_ends):
        trainee = Trainee(size, variant, ranks, **settings)
        with torch.no_grad():
            logits.append(trainee.output().logits_BK)
        del trainee
        release()
    want, got = logits
    error = float((got - want).norm() / want.norm())
    if error <= ERROR:
        return None
    return f"{variant}: logits are off those of the reference back ends by {error:.2g} of their norm, not {ERROR:.2g}"


def measure_all(
    size: Size, chosen: Sequence[Variant], ranks: Ranks, compiler: str, traces: Path
) -> tuple[list[Row], list[str]]:
    """(a row a variant and mode, what failed); `compiler` is a backend of torch.compile."""
    rows: list[Row] = []
    failed: list[str] = []
    for variant in chosen:
        flops = math.nan
        for mode, backend in ((EAGER, None), (COMPILED, compiler)):
            print(f"{variant}, {mode}", flush=True)
            try:
                trainee = Trainee(size, variant, ranks, compiler=backend)
                flops = step_flops(trainee) if mode == EAGER else flops
                trace = traces / f"{str(variant).replace(' ', '-')}-{mode}.json"
                rows.append(measure(size, variant, mode, trainee, flops, trace))
            except Exception as error:  # what the others measure is worth having
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                failed.append(f"{variant}, {mode}: {type(error).__name__}: {reason}")
            trainee = None
            release()
    ffn_ms = {row["mode"]: row["p50_ms"] for row in rows if row["block"] == "ffn"}
    for row in rows:
        row["ratio_to_ffn"] = row["p50_ms"] / ffn_ms[row["mode"]] if row["mode"] in ffn_ms else ""
    return rows, failed


def measure(size: Size, variant: Variant, mode: str, trainee: Trainee, flops: float, trace: Path) -> Row:
    """A row of the CSV but for what FFN's is needed for; `flops` of a step."""
    p20, p50, p80 = step_times(trainee, WARMUP, STEPS)
    memory = step_memory(trainee)
    kernels_ms = trace_steps(trainee, TRACED, trace)
    return {
        "block": variant.block,
        "values": variant.values,
        "value_dim": variant.value_dim or (size.width if variant.values else ""),
        "mode": mode,
        **vars(size),
        "dense_parameters": sum(parameter.numel() for parameter in trainee.dense.values()),
        "value_parameters": sum(values.lookup.weight_RD.numel() for values in trainee.values),
        "p20_ms": p20,
        "p50_ms": p50,
        "p80_ms": p80,
        "ratio_to_ffn": "",
        "examples_per_second": 1e3 * size.batch / p50,
        "tflop": flops / 1e12,
        "tflop_per_second": flops / p50 / 1e9,
        **{f"{name}_gb": count / 1e9 for name, count in vars(memory).items()},
        "peak_over_kept": memory.peak_over_kept,
        **{f"{name} ms": ms for name, ms in kernels_ms.items()},
    }


def table(mode: str, rows: Sequence[Row]) -> Table:
    """The rows of one mode as columns, 110 characters wide."""
    rows = [row for row in rows if row["mode"] == mode]
    printed = Table("", title=f"a training step, {mode}, on {device()}")
    for row in rows:
        printed.add_column(f"{row['block']}\n{row['values']} {row['value_dim']}".rstrip(), justify="right")

    def line(name: str, text: str, key: str) -> None:
        printed.add_row(name, *(format(row[key], text) if row[key] != "" else "" for row in rows))

    for name in ("dense", "value"):
        printed.add_row(f"{name} parameters, M", *(f"{row[f'{name}_parameters'] / 1e6:,.1f}" for row in rows))
    printed.add_section()
    for name in ("p50", "p20", "p80"):
        line(f"{name}, ms", ".2f", f"{name}_ms")
    line("p50 / ffn", ".3f", "ratio_to_ffn")
    line("examples/s", ",.0f", "examples_per_second")
    line("TFLOP", ".3f", "tflop")
    line("TFLOP/s", ".0f", "tflop_per_second")
    printed.add_section()
    for name in ("weights", "optimizer", "gradients", "activations", "peak"):
        line(f"{name}, GB", ".3f", f"{name}_gb")
    line("peak / kept", ".3f", "peak_over_kept")
    printed.add_section()
    for name in (*RANGES, OUTSIDE):
        line(f"{name}, ms", ".3f", f"{name} ms")
    sums = (sum(row[f"{name} ms"] for name in (*RANGES, OUTSIDE)) for row in rows)
    printed.add_row("all kernels, ms", *(f"{ms:.3f}" for ms in sums))
    return printed


if __name__ == "__main__":
    sys.exit(main())
