"""The local look-ups against the naive formulas."""

from __future__ import annotations

import pytest
import torch

from msn_dist.errors import InputError
from msn_dist.kernels import reference
from msn_dist.sharding import lookup as lookups
from msn_dist.sharding.hits import Hits, offsets_of
from msn_dist.sharding.lookup import LOOKUPS, ValueOptimizer, choose_lookup, make_lookup, weights_gradient
from triton_device import DEVICE

ROWS, DIM = 30, 8


def hits_of(lengths: list[int]) -> Hits:
    generator = torch.Generator().manual_seed(len(lengths))
    count = sum(lengths)
    rows_H = torch.randint(ROWS, (count,), generator=generator, dtype=torch.int32)
    return Hits(rows_H, torch.rand(count, generator=generator), offsets_of(torch.tensor(lengths)))


@pytest.mark.parametrize("lengths", [[3, 0, 5, 1], [0, 0], [], [4] * 50])
def test_the_gradient_of_the_weights_is_the_naive_one(lengths: list[int]) -> None:
    hits = hits_of(lengths)
    values_RD, gradient_GD = torch.randn(ROWS, DIM), torch.randn(DIM, len(lengths)).T
    expected_H = reference.weights_gradient(values_RD, hits.rows_H, hits.offsets_G1, gradient_GD)
    torch.testing.assert_close(weights_gradient(values_RD, hits, gradient_GD), expected_H)


@pytest.mark.parametrize("lookup", LOOKUPS)
@pytest.mark.parametrize("of_weights", [True, False])
@pytest.mark.parametrize("tape", [True, False])
def test_a_look_up_reads_and_steps_as_the_naive_formulas(lookup: str, of_weights: bool, tape: bool) -> None:
    device = DEVICE if lookup == "triton" else torch.device("cpu")
    hits = on(device, hits_of([3, 0, 5, 1, 7]))
    table = make_lookup(lookup, ROWS, DIM, ValueOptimizer(0.3, 1e-8), device)
    assert table.name == lookup
    table.weight_RD.copy_(torch.randn(ROWS, DIM))
    values_RD, moment_R = table.weight_RD.clone().requires_grad_(), torch.zeros(ROWS, device=device)
    weights_H, gradient_GD = hits.weights_H.clone().requires_grad_(), torch.randn(5, DIM).to(device)
    expected_GD = reference.weighted_bags(values_RD, hits.rows_H, hits.offsets_G1, weights_H)
    expected_GD.backward(gradient_GD)
    torch.testing.assert_close(table.read(hits, update_follows=tape), expected_GD.detach())
    gradient_H = table.update(hits, gradient_GD, of_weights=of_weights)
    if of_weights or (lookup, tape) == ("fbgemm", True):
        torch.testing.assert_close(gradient_H, weights_H.grad)
    else:
        assert gradient_H is None
    reference.rowwise_adagrad_(values_RD.data, moment_R, values_RD.grad, 0.3, 1e-8)
    torch.testing.assert_close(table.weight_RD, values_RD.detach())
    torch.testing.assert_close(table.moment_R, moment_R)


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_rows_without_weights_come_as_they_are_and_are_stepped(lookup: str) -> None:
    device = DEVICE if lookup == "triton" else torch.device("cpu")
    rows_H = torch.tensor([4, 0, 4, 29], dtype=torch.int32)
    hits = on(device, Hits(rows_H, None, torch.arange(5)))
    table = make_lookup(lookup, ROWS, DIM, ValueOptimizer(0.3, 1e-8), device)
    table.set_learning_rate(0.1)
    table.weight_RD.copy_(torch.randn(ROWS, DIM))
    values_RD, moment_R = table.weight_RD.clone(), torch.zeros(ROWS, device=device)
    assert torch.equal(table.read(hits, update_follows=True), values_RD[rows_H])
    gradient_GD = torch.randn(4, DIM).to(device)
    assert table.update(hits, gradient_GD) is None
    gradient_RD = torch.zeros_like(values_RD).index_add_(0, hits.rows_H, gradient_GD)
    reference.rowwise_adagrad_(values_RD, moment_R, gradient_RD, 0.1, 1e-8)
    torch.testing.assert_close(table.weight_RD, values_RD)
    torch.testing.assert_close(table.moment_R, moment_R)


def on(device: torch.device, hits: Hits) -> Hits:
    weights_H = None if hits.weights_H is None else hits.weights_H.to(device)
    return Hits(hits.rows_H.to(device), weights_H, hits.offsets_G1.to(device))


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("kind", "device", "no_triton", "no_fbgemm", "chosen"),
    [
        ("auto", GPU, None, None, "triton"),
        ("auto", GPU, "it is old", None, "fbgemm"),
        ("auto", GPU, "it is old", "it is missing", "reference"),
        ("auto", CPU, "there is no GPU", None, "fbgemm"),
        ("auto", CPU, None, None, "fbgemm"),  # in the interpreter, which nobody wants to wait for
        ("auto", CPU, None, "it is missing", "reference"),
        ("triton", CPU, None, None, "triton"),
        ("fbgemm", GPU, None, None, "fbgemm"),
        ("reference", GPU, None, None, "reference"),
    ],
)
def test_the_look_up_is_chosen_by_device_and_by_what_is_installed(
    kind: str,
    device: torch.device,
    no_triton: str | None,
    no_fbgemm: str | None,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lookups, "why_no_triton", lambda _: no_triton)
    monkeypatch.setattr(lookups, "_why_no_fbgemm", lambda: no_fbgemm)
    monkeypatch.setattr(lookups, "interpreted", lambda: False)
    assert choose_lookup(kind, device, DIM) == chosen


@pytest.mark.parametrize("kind", ["triton", "fbgemm"])
def test_a_look_up_that_cannot_run_is_refused_with_the_reason(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "why_no_triton", lambda _: "it is old")
    monkeypatch.setattr(lookups, "_why_no_fbgemm", lambda: "it is old")
    with pytest.raises(InputError, match=rf"^memory.lookup={kind}: it is old; set memory.lookup to auto or reference$"):
        choose_lookup(kind, CPU, DIM)


def test_auto_leaves_the_interpreter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "why_no_triton", lambda _: None)
    monkeypatch.setattr(lookups, "interpreted", lambda: True)
    assert choose_lookup("auto", GPU, DIM) == "fbgemm"


def test_values_too_wide_for_the_kernels_go_to_another_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "why_no_triton", lambda _: None)
    monkeypatch.setattr(lookups, "interpreted", lambda: False)
    assert choose_lookup("auto", GPU, 4100) == "fbgemm"
    with pytest.raises(InputError, match="memory.lookup=triton: the kernels take values up to 4096 wide, and these "):
        choose_lookup("triton", GPU, 4100)
