"""Checks a provider, then times it: medians, p20 and p80 by CUDA events, beside the limits of the same GPU.

The L2 cache is written over before each call, and calls take turns through several sets of inputs.  A kernel that only
waits keeps the device busy while the call's kernels are queued, as the work before them does in a training step: the
host's time counts for no provider, unless its call waits for the device.
"""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

OURS = "msn_dist"
_TRITON = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else ""
_QUANTILES = (0.2, 0.5, 0.8)
_COPIED_BYTES, _MATRIX = 2**31, 8192
_L2_BYTES, _MOST_CYCLES = 2**28, 2e9  # more than any L2 holds; cycles of a second, at most
_SHAPE = ("dtype", "slots", "queries", "sub_keys", "key_dim", "k", "n", "bags", "hits", "dim")

Call = Callable[[int], Any]  # of the number of an input set; returns what is checked
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What providers are compared at: columns of the CSV (`where`), bytes that must move, floating operations."""

    kernel: str
    mode: str
    where: dict[str, Any]
    bytes: float
    flops: float = 0.0

    def __str__(self) -> str:
        shape = " ".join(f"{key}={value}" for key, value in self.where.items())
        return f"{self.kernel} {self.mode}: {shape}"


@dataclass(frozen=True)
class Peaks:
    """What this GPU does: bytes/s of a large copy (read and written) and of a large sum (read), floating operations/s
    of a large bf16 product."""

    copy: float
    read: float
    matrix: float

    @classmethod
    def measured(cls) -> Peaks:
        source, target = (torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
        copy_ms = quantiles(lambda _: target.copy_(source), 1, 200)[1]
        numbers = source.view(torch.float32)
        read_ms = quantiles(lambda _: numbers.sum(), 1, 200)[1]
        a, b = (torch.randn(_MATRIX, _MATRIX, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        matrix_ms = quantiles(lambda _: a @ b, 1, 200)[1]
        return cls(2 * _COPIED_BYTES / copy_ms * 1e3, _COPIED_BYTES / read_ms * 1e3, 2 * _MATRIX**3 / matrix_ms * 1e3)

    def __str__(self) -> str:
        return (
            f"copy {self.copy / 1e12:.2f} TB/s, read {self.read / 1e12:.2f} TB/s, "
            f"bf16 matrix product {self.matrix / 1e12:.0f} TFLOP/s"
        )


@dataclass
class Bench:
    """Collects rows of the CSV, and what was wrong; prints each result as it comes.

    `seconds`: from then on peers are skipped, so that a run ends in time.
    """

    peaks: Peaks
    milliseconds: int  # spent on timing a provider
    seconds: float
    rows: list[Row] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    _start: float = field(default_factory=time.monotonic)
    _shown: str = ""

    def __post_init__(self) -> None:
        machine = Case("machine", "peak", {}, 0)
        self._add(machine, "copy", "bandwidth", "GB/s", (self.peaks.copy / 1e9,) * 3)
        self._add(machine, "read", "bandwidth", "GB/s", (self.peaks.read / 1e9,) * 3)
        self._add(machine, "matrix product", "rate", "TFLOP/s", (self.peaks.matrix / 1e12,) * 3)

    def run(
        self,
        case: Case,
        provider: str,
        make: Callable[[], Call],
        check: Callable[[Any], str | None] = lambda _: None,
        sets: int = 1,
        scratch: bool = False,
    ) -> None:
        """Check the call that `make` returns on input set 0 (`check` says what is wrong, or None), then time it.

        `scratch`: also report the most memory that a call takes beyond what is there before and after it.
        A provider that raises is skipped with its reason; if it is ours, that is wrong as well, unless it is missing.
        """
        self._show(case)
        try:
            if not provider.startswith(OURS) and time.monotonic() - self._start > self.seconds:
                raise TimeoutError("the time of this run is up")
            call = make()
            if problem := check(call(0)):
                self._wrong(case, provider, problem)
                return
            peak = most_memory(call) if scratch else None
            times = quantiles(call, sets, self.milliseconds)
        except Exception as error:  # of any kind: what the others measure is worth having
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
            if provider.startswith(OURS) and not isinstance(error, ImportError):
                self._wrong(case, provider, f"{type(error).__name__}: {reason}")
            else:
                print(f"  {provider:<28} skipped: {reason}", flush=True)
            return
        self.add_times(case, provider, times, peak)

    def add_times(self, case: Case, provider: str, times: Sequence[float], scratch: int | None = None) -> None:
        """Rows of a time (ms: p20, p50, p80), and of the rates that it means."""
        self._show(case)
        self._add(case, provider, "time", "ms", times)
        slow_to_fast = times[::-1]  # p20 of a rate belongs to p80 of the time
        text = f"  {provider:<28} {times[1]:9.4f} ms  ({times[0]:.4f} to {times[2]:.4f})"
        if case.bytes:
            rates = [case.bytes / t * 1e3 for t in slow_to_fast]
            self._add(case, provider, "bandwidth", "GB/s", [rate / 1e9 for rate in rates])
            self._add(case, provider, "share of copy bandwidth", "1", [rate / self.peaks.copy for rate in rates])
            text += f"  {rates[1] / 1e9:7.0f} GB/s, {rates[1] / self.peaks.copy:4.0%} of a copy"
        if case.flops:
            shares = [case.flops / t * 1e3 / self.peaks.matrix for t in slow_to_fast]
            self._add(case, provider, "share of matrix rate", "1", shares)
            text += f", {shares[1]:4.0%} of the matrix rate"
        if hits := case.where.get("bags", 0) * case.where.get("hits", 0):
            self._add(case, provider, "time of a hit", "ns", [t * 1e6 / hits for t in times])
        if scratch is not None:
            self._add(case, provider, "scratch memory", "MB", (scratch / 1e6,) * 3)
            text += f", {scratch / 1e6:.0f} MB of scratch"
        print(text, flush=True)

    def _wrong(self, case: Case, provider: str, problem: str) -> None:
        self.wrong.append(f"{case}, {provider}: {problem}")
        print(f"  {provider:<28} WRONG, not timed: {problem}", flush=True)

    def _show(self, case: Case) -> None:
        if self._shown != str(case):
            self._shown = str(case)
            print(case, flush=True)

    def _add(self, case: Case, provider: str, metric: str, unit: str, values: Sequence[float]) -> None:
        p20, p50, p80 = values
        where = {**dict.fromkeys(_SHAPE, ""), **case.where}
        measured = {"metric": metric, "unit": unit, "p20": p20, "p50": p50, "p80": p80}
        row = {"kernel": case.kernel, "provider": provider, "mode": case.mode, **where, **measured}
        self.rows.append({**row, "triton": _TRITON})


def quantiles(call: Call, sets: int, milliseconds: int) -> list[float]:
    """p20, p50, p80 of the device's time of a call, ms, over so many of them (10 to 200 calls)."""
    call(0)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call(1 % sets)
    queued = time.perf_counter() - begin
    torch.cuda.synchronize()
    whole = time.perf_counter() - begin
    cycles = int((1.5 * queued + 3e-4) * _MOST_CYCLES)
    over_l2 = torch.empty(_L2_BYTES, dtype=torch.int8, device="cuda")
    events = []
    for turn in range(max(10, min(200, int(milliseconds / 1e3 / whole)))):
        over_l2.zero_()
        torch.cuda._sleep(cycles)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(turn % sets)
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    times = torch.tensor([start.elapsed_time(end) for start, end in events])
    return times.quantile(torch.tensor(_QUANTILES)).tolist()


def release() -> None:
    """Free what providers have left behind: modules in reference cycles, compiled code that holds on to tables."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def most_memory(call: Call) -> int:
    """Bytes that a call takes beyond those that were taken before; what it returns is part of them."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
