"""What benchmarks.step trains and reports: models, floating operations, memory, ranges, rows."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import step, step_profile
from benchmarks.results import write_rows
from benchmarks.step_models import RANGES, Size, Trainee, Variant
from benchmarks.step_profile import OUTSIDE, StepMemory, range_times, step_flops, step_memory, step_times
from msn_dist.config import RankMixerConfig, TrainingConfig
from msn_dist.training.ranks import Ranks, joined_ranks
from triton_device import DEVICE

SIZE = Size(batch=8, in_width=24, tokens=2, width=16, layers=2, sub_keys=9, top_k=4)
HIDDEN = 32
MSN = Variant("msn_ffn", "fp32")
NOISE = [  # of libraries; see msn_dist.training.quiet
    "ignore:`_get_pg_default_device` will be deprecated:UserWarning",
    "ignore:Multiple backends are registered:UserWarning",
    "ignore:TBE B200 optimization:UserWarning",
    "ignore:TensorFloat32 tensor cores:UserWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",  # torch.compile looks at every input's
]
pytestmark = [pytest.mark.filterwarnings(line) for line in NOISE]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined_ranks(TrainingConfig(device=DEVICE.type)) as ranks:
        yield ranks


def test_without_a_gpu_it_says_so_and_exits_with_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["step"])
    assert step.main() == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_the_paper_sized_model_has_memory_on_two_of_four_layers():
    size = Size()
    assert (size.batch, size.tokens, size.width, size.layers, size.sub_keys, size.top_k) == (2048, 16, 1024, 4, 256, 32)
    model = RankMixerConfig(block="msn_ffn", tokens=size.tokens, width=size.width, layers=size.layers)
    assert len(model.layers_with_memory) == 2


@pytest.mark.parametrize("variant", step.variants(), ids=str)
def test_every_variant_learns_in_its_dense_part_and_in_its_values(variant: Variant, ranks: Ranks):
    trainee = Trainee(SIZE, variant, ranks)
    assert len(trainee.values) == bool(variant.values)
    stepped = [*trainee.dense.values(), *(values.lookup.weight_RD for values in trainee.values)]
    before = [tensor.detach().clone() for tensor in stepped]
    losses = [float(trainee.step()) for _ in range(2)]
    assert all(0.3 < loss < 3 for loss in losses)
    assert not any(torch.equal(old, new) for old, new in zip(before, stepped, strict=True))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}
    assert all(values.lookup.weight_RD.dtype == dtype[variant.values] for values in trainee.values)


@pytest.mark.parametrize("variant", [Variant("smoe"), MSN], ids=str)
def test_compiled_steps_are_those_of_eager_and_go_through_graphs(variant: Variant, ranks: Ranks):
    losses = []
    for compiler in (None, "aot_eager"):
        torch._dynamo.utils.counters.clear()
        trainee = Trainee(SIZE, variant, ranks, compiler=compiler)
        losses.append([float(trainee.step()) for _ in range(3)])
        assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == bool(compiler)
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    torch.compiler.reset()


def test_flops_of_ffn_are_those_of_the_formula(ranks: Ranks):
    bags, layers = SIZE.batch * SIZE.tokens, SIZE.layers
    tokenizer = 2 * 2 * SIZE.batch * SIZE.in_width * SIZE.width  # features have no gradient
    networks = 3 * layers * 2 * 2 * bags * SIZE.width * HIDDEN
    head = 3 * 2 * SIZE.batch * SIZE.width
    assert step_flops(Trainee(SIZE, Variant("ffn"), ranks)) == tokenizer + networks + head


def test_flops_of_experts_are_those_of_the_two_that_a_token_visits(ranks: Ranks):
    bags, (tokenizer, head) = SIZE.batch * SIZE.tokens, (4 * 8 * 24 * 16, 6 * 8 * 16)
    router = 3 * 2 * bags * SIZE.width * 6
    experts = 2 * 3 * 2 * 2 * bags * SIZE.width * HIDDEN
    assert step_flops(Trainee(SIZE, Variant("smoe"), ranks)) == tokenizer + head + SIZE.layers * (router + experts)


@pytest.mark.parametrize("retrieval", ["reference", "triton"])
def test_scores_count_the_same_on_either_back_end(retrieval: str, ranks: Ranks):
    bags, sub_keys, key_dim = SIZE.batch * SIZE.tokens, SIZE.sub_keys, 32
    queries = 3 * 2 * 2 * bags * SIZE.width * key_dim
    keys = 3 * 2 * 2 * sub_keys * key_dim * key_dim  # Theta C
    scores = 3 * 4 * bags * sub_keys * key_dim
    ffn = step_flops(Trainee(SIZE, Variant("ffn"), ranks))
    assert step_flops(Trainee(SIZE, MSN, ranks, retrieval=retrieval)) == ffn + queries + keys + scores


@pytest.mark.parametrize("values", ["fp32", "bf16"])
def test_memory_is_that_of_weights_state_gradients_and_what_the_forward_leaves(values: str, ranks: Ranks, monkeypatch):
    trainee = Trainee(SIZE, Variant("msn_ffn", values), ranks)
    trainee.step()
    dense, slots, width = sum(p.numel() for p in trainee.dense.values()), SIZE.sub_keys**2, SIZE.width
    alive, forward = [1000], trainee.forward

    def forward_that_leaves_300():
        alive.append(1300)
        return forward()

    monkeypatch.setattr(step_profile, "allocated", lambda on_gpu: alive[-1])
    monkeypatch.setattr(trainee, "forward", forward_that_leaves_300)
    memory = step_memory(trainee)
    counters = 4 * len(trainee.dense)  # AdamW counts steps in a float for every parameter
    assert memory.weights == 4 * dense + {"fp32": 4, "bf16": 2}[values] * slots * width
    assert memory.optimizer == 8 * dense + counters + 4 * slots
    assert memory.gradients == 4 * dense
    assert memory.activations == 300
    assert StepMemory(10, 20, 30, 40, peak=110).peak_over_kept == 1.1


@pytest.mark.gpu
def test_on_a_gpu_activations_and_peak_are_measured(ranks: Ranks):
    trainee = Trainee(Size(batch=64, tokens=4, width=256, layers=2, sub_keys=64), MSN, ranks)
    step_times(trainee, 2, 2)
    memory = step_memory(trainee)
    tokens = 2 * 64 * 4 * 256 * 4  # in float32 before the norms of two layers
    assert tokens < memory.activations < memory.peak
    assert memory.peak_over_kept > 0.9


def test_a_step_has_all_its_ranges_in_the_trace(ranks: Ranks, tmp_path: Path):
    of_layers = {"mixing and norms", "memory retrieval", "gate", "ffn / smoe"}
    for compiler, absent in ((None, set()), ("eager", of_layers)):
        trainee = Trainee(SIZE, MSN, ranks, compiler=compiler)
        times = step_profile.trace_steps(trainee, 3, tmp_path / "trace.json")
        text = (tmp_path / "trace.json").read_text()
        assert {name for name in RANGES if f'"name": "{name}"' not in text} == absent
        sides = 1 if DEVICE.type == "cpu" else 2  # a GPU's trace has a range on the host and on the device
        assert text.count('"name": "memory update"') == 3 * sides
        assert list(times) == [*RANGES, OUTSIDE]
        assert DEVICE.type == "cpu" or times["memory update"] > 0
    torch.compiler.reset()


def test_kernels_belong_to_the_innermost_range_at_their_launch():
    def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: int) -> dict:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}

    events = [
        event("user_annotation", "backward", 100, 100),
        event("user_annotation", "memory update", 150, 20, tid=2),
        event("user_annotation", "something else", 155, 1),
        event("cuda_runtime", "cudaLaunchKernel", 120, 2, tid=2, correlation=1),
        event("cuda_driver", "cuLaunchKernel", 155, 2, tid=2, correlation=2),
        event("cuda_runtime", "cudaMemcpyAsync", 170, 2, tid=2, correlation=3),
        event("cuda_runtime", "cudaLaunchKernel", 250, 2, correlation=4),
        event("kernel", "a", 160, 1000, correlation=1),  # runs when another range is open
        event("kernel", "b", 1160, 2000, correlation=2),
        event("gpu_memcpy", "c", 3160, 500, correlation=3),
        event("kernel", "d", 3700, 30, correlation=4),
        event("kernel", "launched before the trace began", 90, 5, correlation=99),
        {"ph": "M", "name": "process_name"},
    ]
    times = {name: ms for name, ms in range_times(events).items() if ms}
    assert times == pytest.approx({"backward": 1.5, "memory update": 2.0, OUTSIDE: 0.035})


@pytest.mark.parametrize("lookup", ["fbgemm", "triton"])
def test_the_check_passes_what_is_right_and_finds_what_is_not(lookup: str, ranks: Ranks, monkeypatch):
    if lookup == "fbgemm":
        pytest.importorskip("fbgemm_gpu")
    size = Size(batch=16, in_width=24, tokens=2, width=32, layers=2, sub_keys=16, top_k=8)
    assert step.wrong_output(size, MSN, ranks, lookup=lookup) is None
    output = Trainee.output

    def of_neighbours(trainee: Trainee):
        for values in trainee.values:
            if values.lookup.name == lookup:
                values.lookup.weight_RD.copy_(values.lookup.weight_RD.roll(1, 0))
        return output(trainee)

    monkeypatch.setattr(Trainee, "output", of_neighbours)
    assert "msn_ffn fp32: logits are off" in step.wrong_output(size, MSN, ranks, lookup=lookup)


def test_rows_have_their_columns_and_their_ratio_to_ffn_of_the_same_mode(ranks: Ranks, monkeypatch, tmp_path, capsys):
    times = iter([[1.0, 2.0, 3.0], [0.5, 1.0, 2.0], [2.0, 3.0, 4.0], [2.0, 2.5, 4.0]])
    monkeypatch.setattr(step, "step_times", lambda trainee, warmup, steps: (trainee.step(), next(times))[1])
    monkeypatch.setattr("benchmarks.results.FOLDER", tmp_path)
    rows, failed = step.measure_all(SIZE, [Variant("ffn"), MSN], ranks, "eager", tmp_path)
    assert not failed
    assert [(row["block"], row["values"], row["mode"], row["ratio_to_ffn"]) for row in rows] == [
        ("ffn", "", "eager", 1.0), ("ffn", "", "compiled", 1.0),
        ("msn_ffn", "fp32", "eager", 1.5), ("msn_ffn", "fp32", "compiled", 2.5),
    ]  # fmt: skip
    eager, compiled = rows[2:]
    assert (eager["batch"], eager["sub_keys"], eager["value_parameters"]) == (8, 9, 81 * 16)
    assert eager["examples_per_second"] == pytest.approx(8 / 3e-3)
    assert compiled["tflop"] == eager["tflop"] > rows[0]["tflop"]
    assert eager["tflop_per_second"] == pytest.approx(eager["tflop"] / 3e-3)
    assert {"weights_gb", "optimizer_gb", "gradients_gb", "activations_gb", "peak_gb", "peak_over_kept"} <= set(eager)
    assert {f"{name} ms" for name in (*RANGES, OUTSIDE)} <= set(eager)
    header = write_rows("step.csv", rows).read_text().splitlines()[0].split(",")
    assert header[: len(eager)] == list(eager) and "torch" in header
    assert sorted(path.name for path in tmp_path.glob("*.json"))[0] == "ffn-compiled.json"
    capsys.readouterr()
    Console(width=120).print(step.table("eager", rows))
    printed = capsys.readouterr().out
    assert "1.500" in printed and "…" not in printed


def test_a_variant_that_fails_is_told_and_the_others_are_measured(ranks: Ranks, monkeypatch, tmp_path):
    def measure(size, variant, mode, *_):
        if (variant, mode) == (MSN, "compiled"):
            raise RuntimeError("no memory left\nand more")
        return {"block": variant.block, "mode": mode, "p50_ms": math.pi}

    monkeypatch.setattr(step, "measure", measure)
    monkeypatch.setattr(step, "step_flops", lambda _: 0)
    rows, failed = step.measure_all(SIZE, [Variant("ffn"), MSN], ranks, "eager", tmp_path)
    assert failed == ["msn_ffn fp32, compiled: RuntimeError: no memory left"]
    assert [row["mode"] for row in rows] == ["eager", "compiled", "eager"]
