"""What a step of benchmarks.step takes: time, floating operations, memory, and kernel time by named range."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.step_models import RANGES, Trainee
from msn_dist.kernels.support import why_no_triton
from msn_dist.memory.product_keys import ProductKeys

OUTSIDE = "outside"  # of all ranges
_LAUNCHES, _WORK = ("cuda_runtime", "cuda_driver"), ("kernel", "gpu_memcpy", "gpu_memset")


def step_times(trainee: Trainee, warmup: int, steps: int) -> list[float]:
    """p20, p50, p80 of a step, ms, on the device's clock: from the end of one step to the end of the next."""
    for _ in range(warmup):
        trainee.step()
    if trainee.device.type == "cuda":
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        ends[0].record()
        for end in ends[1:]:
            trainee.step()
            end.record()
        torch.cuda.synchronize()
        times = [one.elapsed_time(other) for one, other in zip(ends, ends[1:], strict=False)]
    else:
        clock = [time.perf_counter()]
        for _ in range(steps):
            trainee.step()
            clock.append(time.perf_counter())
        times = [1e3 * (other - one) for one, other in zip(clock, clock[1:], strict=False)]
    return torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()


def step_flops(trainee: Trainee) -> int:
    """Floating operations of a step that are matrix products; it runs one, which must not be compiled.

    torch.utils.flop_counter sees the dense part, forward and backward.  Scores of a retrieval of M queries count as
    4 * M * N * d_k forward (two axes, a product and a sum) and as twice that backward, one product for the queries and
    one for the keys: 3 * 4 * M * N * d_k.  The reference does just that and is counted as it runs.  The kernels are
    given the same by formula, although their backward is of the k selected entries alone.  Element-wise work, norms,
    look-ups and optimizers do not count.
    """
    formulas: dict[Any, Any] = {torch.ops.aten._grouped_mm: _grouped_product}
    with contextlib.ExitStack() as stack:
        if why_no_triton(trainee.device) is None:
            from msn_dist.kernels import ops

            formulas[torch.ops.msn_dist.retrieve] = _scores(1)
            formulas[torch.ops.msn_dist.retrieve_backward] = _scores(2)
            stack.enter_context(patch.object(ops, "retrieve", ops.retrieve_op))  # which alone is seen
            stack.enter_context(patch.object(ProductKeys, "has_search", lambda *_: False))  # which goes past it
        counter = stack.enter_context(FlopCounterMode(display=False, custom_mapping=formulas))
        trainee.step()
    return counter.get_total_flops()


def _grouped_product(one: Sequence[int], other: Sequence[int], *_: Any, **__: Any) -> int:
    # of the rows of one group with one matrix each, or summed over them: no row counts for two groups
    return 2 * math.prod(one) * other[-1]


def _scores(products: int) -> Any:
    def both_axes(queries: Sequence[int], keys: Sequence[int], *_: Any, **__: Any) -> int:
        return products * 2 * math.prod(queries) * keys[2]

    return both_axes


@dataclass(frozen=True)
class StepMemory:
    """Bytes.  Activations are what the forward leaves allocated: tensors that autograd saves, among them the 16-bit
    copies of the weights.  `peak` is the most that is allocated during the step, by anything."""

    weights: int
    optimizer: int
    gradients: int
    activations: int
    peak: int

    @property
    def peak_over_kept(self) -> float:
        """1 if nothing is allocated but what must be kept; what is above are temporaries."""
        return self.peak / (self.weights + self.optimizer + self.gradients + self.activations)


def step_memory(trainee: Trainee) -> StepMemory:
    """Of one step, which must not be the first: optimizers and gradients have their tensors by then.

    Gradients are those of the dense parameters; values have none.  On a CPU, activations and peak are 0.
    """
    dense, lookups = list(trainee.dense.values()), [values.lookup for values in trainee.values]
    gradients = _bytes(parameter.grad for parameter in dense)
    on_gpu = trainee.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = allocated(on_gpu)
    loss = trainee.forward()
    activations = allocated(on_gpu) - before
    trainee.backward(loss)
    trainee.update()
    state = (value for state in trainee.optimizer.state.values() for value in state.values())
    return StepMemory(
        weights=_bytes([*dense, *(lookup.weight_RD for lookup in lookups)]),
        optimizer=_bytes(state) + _bytes(lookup.state.moment_R for lookup in lookups),
        gradients=gradients,
        activations=activations,
        peak=torch.cuda.max_memory_allocated() if on_gpu else 0,
    )


def allocated(on_gpu: bool) -> int:
    """Bytes of the tensors that are alive on the GPU."""
    return torch.cuda.memory_allocated() if on_gpu else 0


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def trace_steps(trainee: Trainee, steps: int, path: Path) -> dict[str, float]:
    """Write a Chrome trace of some steps; returns ms of a step that kernels of each range take, as `range_times`."""
    on_gpu = trainee.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    # a step before, while the profiler gets ready
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule, acc_events=True) as profiler:
        for step in range(1 + steps):
            trainee.step()
            if on_gpu and step in (0, steps):  # or its kernels would run into the next step's time
                torch.cuda.synchronize()
            profiler.step()
    profiler.export_chrome_trace(str(path))
    return {name: ms / steps for name, ms in range_times(json.loads(path.read_text())["traceEvents"]).items()}


def range_times(events: Iterable[dict[str, Any]]) -> dict[str, float]:
    """ms of GPU work by RANGES and OUTSIDE, in a Chrome trace's events.

    Work belongs to the innermost range around its launch, by the clock: autograd launches from a thread of its own.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    ranges = [
        (event["ts"], event["ts"] + event["dur"], event["name"])
        for event in complete
        if event.get("cat") == "user_annotation" and event["name"] in RANGES
    ]
    launched_at = {
        event["args"]["correlation"]: event["ts"]
        for event in complete
        if event.get("cat") in _LAUNCHES and "correlation" in event["args"]
    }
    times: defaultdict[str, float] = defaultdict(float)
    for event in complete:
        if event.get("cat") in _WORK:
            at = launched_at.get(event["args"].get("correlation"), -math.inf)
            around = [(start, name) for start, stop, name in ranges if start <= at < stop]
            times[max(around, default=(0, OUTSIDE))[1]] += event["dur"] / 1e3
    return {name: times[name] for name in (*RANGES, OUTSIDE)}
