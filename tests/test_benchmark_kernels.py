"""What benchmarks.kernels does before and after it times: inputs, peers, checks, CSV rows and plot."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import kernel_gather, kernel_retrieval, kernel_timing, kernel_update, kernels, sanitized
from benchmarks.kernel_airtopk import AirTopK
from benchmarks.kernel_plot import draw
from benchmarks.kernel_retrieval import BF16, EXACT, Shape, Truth
from benchmarks.kernel_tables import make_hits, make_table
from benchmarks.kernel_timing import Bench, Case, Peaks
from benchmarks.kernel_update import Checked, Inputs
from triton_device import DEVICE

SHAPE = Shape(queries=9, sub_keys=37, key_dim=16, k=8)
GATHERED = Case("sparse gather", "forward", {"dtype": "bf16", "n": 64, "bags": 4, "hits": 8, "dim": 4}, bytes=1e9)


def test_without_a_gpu_it_says_so_and_exits_with_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["kernels"])
    assert kernels.main() == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, EXACT), (torch.bfloat16, BF16)])
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_eager_retrieval_passes_the_check(dtype, rounding, mode):
    inputs = SHAPE.inputs(0, str(DEVICE))
    call = kernel_retrieval._call(partial(kernel_retrieval._eager, SHAPE, dtype, str(DEVICE)), [inputs], SHAPE, mode)
    assert Truth(inputs, SHAPE).problem(call(0), rounding) is None


def test_the_check_of_retrieval_finds_each_kind_of_error():
    inputs = SHAPE.inputs(0, str(DEVICE))
    make = partial(kernel_retrieval._eager, SHAPE, torch.float32, str(DEVICE))
    slots_MK, weights_MK, gradients = kernel_retrieval._call(make, [inputs], SHAPE, "forward+backward")(0)
    problem = Truth(inputs, SHAPE).problem

    worse_MK, twice_MK, outside_MK = (slots_MK.clone() for _ in range(3))
    worse_MK[3, -1] = next(slot for slot in range(37**2) if slot not in slots_MK[3])
    twice_MK[3, -1] = twice_MK[3, 0]
    outside_MK[3, -1] = 37**2
    off = (gradients[0], gradients[1] * 1.2, *gradients[2:])
    assert "beaten" in problem((worse_MK, weights_MK, ()), EXACT)
    assert "twice" in problem((twice_MK, weights_MK, ()), EXACT)
    assert "outside" in problem((outside_MK, weights_MK, ()), EXACT)
    assert "weight" in problem((slots_MK, weights_MK * 1.01, ()), EXACT)
    assert "weight" in problem((slots_MK, weights_MK * float("nan"), ()), EXACT)
    assert "gradient" in problem((slots_MK, weights_MK, off), EXACT)


@pytest.mark.parametrize("slots", ["uniform", "zipf", "hot"])
def test_hits_lie_in_the_table_and_are_as_skewed_as_named(slots):
    hits = make_hits(slots, 5000, bags=200, hits=32, seed=0, device=str(DEVICE))
    assert hits.rows_GL.shape == hits.weights_GL.shape == (200, 32)
    assert 0 <= hits.rows_GL.min() and hits.rows_GL.max() < 5000
    most = hits.rows_GL.flatten().bincount().max()
    least, highest = {"uniform": (1, 12), "zipf": (500, 1200), "hot": (200, 212)}[slots]
    assert least <= most <= highest


def test_renamed_zipf_rows_stay_distinct():
    n = 5000
    ranks = torch.arange(n)
    from benchmarks.kernel_tables import _step_without_factor_of

    assert len((ranks * _step_without_factor_of(n) % n).unique()) == n


@pytest.mark.parametrize("make", [kernel_gather._ours, kernel_gather._embedding_bag], ids=["ours", "embedding_bag"])
def test_gathers_agree_with_the_reference(make):
    values_RD = make_table(300, 12, torch.bfloat16, str(DEVICE))
    hits = make_hits("uniform", 300, 5, 8, seed=0, device=str(DEVICE))
    want_GD = kernel_gather.truth(values_RD, hits)
    got_GD = make(values_RD, [hits])(0)
    assert kernel_gather.problem(want_GD, got_GD, 2**-7) is None
    got_GD[2, 3] += 1
    assert "off by" in kernel_gather.problem(want_GD, got_GD, 2**-7)


def _checked(provider: Callable, dtype: torch.dtype) -> tuple[Checked, Callable[[int], Tensor]]:
    values_RD = make_table(5000, 8, dtype, str(DEVICE))
    inputs = Inputs.made("hot", 5000, 8, bags=(16, 4), sets=1, device=str(DEVICE))
    checked = Checked(values_RD, inputs, partial(provider, values_RD, inputs))
    return checked, checked.make()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_update_passes_the_check(dtype):
    checked, call = _checked(kernel_update.ours, dtype)
    assert checked.problem(call(0)) is None


def test_fbgemm_update_passes_the_check():
    pytest.importorskip("fbgemm_gpu")
    checked, call = _checked(partial(kernel_update.tbe, dtype=torch.float32), torch.float32)
    assert checked.problem(call(0)) is None


def test_the_check_of_the_update_finds_each_kind_of_error():
    checked, call = _checked(kernel_update.ours, torch.bfloat16)
    weight_RD, moment_R = checked._table
    before_RD = weight_RD.clone()
    gradient_GL = call(0)
    after_RD = weight_RD.clone()
    assert "gradients of weights" in checked.problem(gradient_GL * 1.01)
    moment_R *= 1.1
    assert "moments" in checked.problem(gradient_GL)
    moment_R /= 1.1
    weight_RD.copy_(before_RD)
    assert "rows differ" in checked.problem(gradient_GL)
    weight_RD.copy_(after_RD)
    weight_RD[moment_R == 0] += 1
    assert "without a hit" in checked.problem(gradient_GL)


def test_a_library_that_is_not_built_says_how(tmp_path):
    with pytest.raises(FileNotFoundError, match="build.sh"):
        AirTopK(tmp_path / "libairtopk.so")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(kernel_timing, "quantiles", lambda *_: [1.0, 2.0, 4.0])
    return Bench(Peaks(copy=4e12, read=4.4e12, matrix=8e14), milliseconds=1, seconds=60.0)


def test_rows_hold_times_and_rates_in_order(bench):
    bench.run(GATHERED, "a peer", lambda: lambda _: None)
    rows = {row["metric"]: (row["p20"], row["p50"], row["p80"]) for row in bench.rows if row["provider"] == "a peer"}
    assert rows["time"] == (1.0, 2.0, 4.0)
    assert rows["bandwidth"] == (250.0, 500.0, 1000.0)
    assert rows["share of copy bandwidth"] == (0.0625, 0.125, 0.25)
    assert rows["time of a hit"] == (31250.0, 62500.0, 125000.0)
    assert len({tuple(row) for row in bench.rows}) == 1


def test_a_peer_that_fails_is_skipped_and_ours_is_wrong(bench, capsys):
    def broken():
        raise RuntimeError("no memory left\nand more")

    before = len(bench.rows)
    bench.run(GATHERED, "a peer", broken)
    assert "skipped: no memory left\n" in capsys.readouterr().out and not bench.wrong
    bench.run(GATHERED, "msn_dist", broken)
    assert "no memory left" in bench.wrong[0] and len(bench.rows) == before


def test_a_wrong_result_is_not_timed(bench):
    before = len(bench.rows)
    bench.run(GATHERED, "a peer", lambda: lambda _: 3, check=lambda got: f"{got} is not 4")
    assert bench.wrong == [f"{GATHERED}, a peer: 3 is not 4"] and len(bench.rows) == before


def test_peers_are_skipped_once_the_time_is_up(bench, capsys):
    bench.seconds = -1.0
    for provider in ("a peer", "msn_dist"):
        bench.run(GATHERED, provider, lambda: lambda _: None)
    assert "the time of this run is up" in capsys.readouterr().out
    assert {row["provider"] for row in bench.rows if row["kernel"] != "machine"} == {"msn_dist"}


def test_the_plot_is_drawn_from_the_csv(bench, tmp_path: Path):
    bench.run(GATHERED, "msn_dist", lambda: lambda _: None)
    bench.run(SHAPE.case("forward"), "airtopk, scores bf16", lambda: lambda _: None)
    path = tmp_path / "kernels.csv"
    conditions = {"device": "a GPU", "python": "3.12", "torch": "2.11", "fbgemm": "", "date": "2026-11-24"}
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*bench.rows[0], *conditions])
        writer.writeheader()
        writer.writerows({**row, **conditions} for row in bench.rows)
    drawn = draw(path).read_text()
    assert drawn.count('<g id="axes_') == 2 and draw(path).read_text() == drawn


def test_what_the_sanitizer_watches_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"RETRIEVALS": ((5, 20, 16, 4),), "TABLES": ((50, 8),), "BAGS": 3, "HITS": 4}
    small |= {"TOKENS": ((2, 3, 5),), "NORMS": ((5, 2, 20),)}
    for name, value in small.items():
        monkeypatch.setattr(sanitized, name, value)
    sanitized.run_all(DEVICE)
