"""The local look-ups against the naive formulas."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from msn_dist.errors import InputError
from msn_dist.kernels import reference
from msn_dist.sharding import lookup as lookups
from msn_dist.sharding import sums
from msn_dist.sharding.hits import Hits, offsets_of
from msn_dist.sharding.lookup import LOOKUPS, Lookup, choose_lookup, make_lookup
from msn_dist.sharding.rounding import round_at_random
from msn_dist.sharding.sums import weights_gradient
from msn_dist.sharding.value_optimizer import ValueOptimizer
from naive_optimizer import KINDS, NaiveOptimizer, optimizer_of
from triton_device import DEVICE

ROWS, DIM = 30, 8
HALVES = [torch.bfloat16, torch.float16]


def hits_of(lengths: list[int]) -> Hits:
    generator = torch.Generator().manual_seed(len(lengths))
    count = sum(lengths)
    rows_H = torch.randint(ROWS, (count,), generator=generator, dtype=torch.int32)
    return Hits(rows_H, torch.rand(count, generator=generator), offsets_of(torch.tensor(lengths)))


def device_of(lookup: str) -> torch.device:
    return DEVICE if lookup == "triton" else torch.device("cpu")


@pytest.mark.parametrize("lengths", [[3, 0, 5, 1], [0, 0], [], [4] * 50])
def test_the_gradient_of_the_weights_is_the_naive_one(lengths: list[int]) -> None:
    hits = hits_of(lengths)
    values_RD, gradient_GD = torch.randn(ROWS, DIM), torch.randn(DIM, len(lengths)).T
    expected_H = reference.weights_gradient(values_RD, hits.rows_H, hits.offsets_G1, gradient_GD)
    torch.testing.assert_close(weights_gradient(values_RD, hits, gradient_GD), expected_H)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("lengths", [[3, 0, 5, 1], [], [4] * 50])
def test_the_gradient_of_the_weights_of_16_bit_values_is_summed_in_float32(
    lengths: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums, "_PIECE", 7 * DIM)
    hits = hits_of(lengths)
    values_RD, gradient_GD = torch.randn(ROWS, DIM).to(dtype), torch.randn(len(lengths), DIM)
    expected_H = reference.weights_gradient(values_RD.float(), hits.rows_H, hits.offsets_G1, gradient_GD)
    torch.testing.assert_close(weights_gradient(values_RD, hits, gradient_GD), expected_H)


ANY_DTYPE = [(lookup, torch.float32) for lookup in LOOKUPS] + list(product(["reference", "triton"], HALVES))
ANY_KIND = [
    (*served, kind) for served, kind in product(ANY_DTYPE, KINDS) if (served[0], kind) != ("fbgemm", "rowwise_adam")
]


@pytest.mark.parametrize(("lookup", "dtype", "kind"), ANY_KIND)
@pytest.mark.parametrize("of_weights", [True, False])
@pytest.mark.parametrize("tape", [True, False])
def test_a_look_up_reads_and_steps_as_the_naive_formulas(
    lookup: str, dtype: torch.dtype, kind: str, of_weights: bool, tape: bool
) -> None:
    device = device_of(lookup)
    hits = on(device, hits_of([3, 0, 5, 1, 7]))
    table = make_lookup(lookup, ROWS, DIM, optimizer_of(kind), device, dtype)
    assert (table.name, table.weight_RD.dtype) == (lookup, dtype)
    table.weight_RD.copy_(torch.randn(ROWS, DIM))
    values_RD = table.weight_RD.to(torch.float32, copy=True).requires_grad_()
    naive = NaiveOptimizer(table.optimizer, values_RD.detach())
    weights_H, gradient_GD = hits.weights_H.clone().requires_grad_(), torch.randn(5, DIM).to(device)
    expected_GD = reference.weighted_bags(values_RD, hits.rows_H, hits.offsets_G1, weights_H)
    expected_GD.backward(gradient_GD)
    torch.testing.assert_close(table.read(hits, update_follows=tape), expected_GD.detach())
    gradient_H = table.update(hits, gradient_GD, of_weights=of_weights)
    if of_weights or (lookup, tape) == ("fbgemm", True):
        torch.testing.assert_close(gradient_H, weights_H.grad)
    else:
        assert gradient_H is None
    naive.step(values_RD.data, values_RD.grad, hits.rows_H)
    assert_stored(table, values_RD.detach())
    assert_state(table, naive)


@pytest.mark.parametrize("tape", [True, False])
@pytest.mark.parametrize("lookup", LOOKUPS)
def test_sums_of_16_bits_are_those_of_32_rounded_and_step_rows_as_their_gradient_says(lookup: str, tape: bool) -> None:
    device = device_of(lookup)
    found = []
    gradient_GD = torch.randn(5, DIM).to(device, torch.bfloat16)
    hits, start_RD = on(device, hits_of([3, 0, 5, 1, 7])), torch.randn(ROWS, DIM)
    for dtype in (torch.float32, torch.bfloat16):
        table = make_lookup(lookup, ROWS, DIM, optimizer_of("rowwise_adagrad"), device)
        table.weight_RD.copy_(start_RD)
        read_GD = table.read(replace(hits), update_follows=tape, dtype=dtype)
        assert read_GD.dtype == dtype
        found.append([read_GD.float(), table.update(hits, gradient_GD.to(dtype)), table.weight_RD])
    (exact_GD, *stepped), (rounded_GD, *also_stepped) = found
    torch.testing.assert_close(rounded_GD, exact_GD, rtol=2**-7, atol=0)  # Triton's interpreter cuts off
    assert not torch.equal(rounded_GD, exact_GD)
    for one, other in zip(also_stepped, stepped, strict=True):
        torch.testing.assert_close(one, other)


def assert_state(table: Lookup, naive: NaiveOptimizer) -> None:
    """float32, whatever the values are."""
    state = {"moment": table.state.moment_R, "first_moment": table.state.first_RD, "step": table.state.steps}
    assert {name for name, tensor in state.items() if tensor is not None} == naive.state.keys()
    for name, tensor in naive.state.items():
        torch.testing.assert_close(state[name], tensor)


def steps_of_some_rows(table: Lookup, device: torch.device) -> None:
    """Three steps, among reads that no step follows; every other row is never hit."""
    table.weight_RD.copy_(torch.randn(ROWS, DIM))
    values_RD = table.weight_RD.clone()
    naive = NaiveOptimizer(table.optimizer, values_RD)
    for number in range(3):
        hits = hits_of([4, 2 + number])
        hits = on(device, Hits(hits.rows_H // 2 * 2, hits.weights_H, hits.offsets_G1))
        with torch.no_grad():
            table.read(hits)
        gradient_GD = torch.randn(2, DIM).to(device)
        table.set_learning_rate(0.1 + number)
        table.read(hits, update_follows=number > 0)
        table.update(hits, gradient_GD)
        gradient_RD = torch.zeros_like(values_RD)
        gradient_RD.index_add_(0, hits.rows_H, gradient_GD[hits.bag_H()] * hits.weights_H[:, None])
        naive.step(values_RD, gradient_RD, hits.rows_H, 0.1 + number)
    torch.testing.assert_close(table.weight_RD, values_RD)
    assert_state(table, naive)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lookup", LOOKUPS)
def test_steps_are_counted_and_not_reads(lookup: str, kind: str) -> None:
    if (lookup, kind) != ("fbgemm", "rowwise_adam"):
        steps_of_some_rows(make_lookup(lookup, ROWS, DIM, optimizer_of(kind), device_of(lookup)), device_of(lookup))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lookup", LOOKUPS)
def test_steps_are_counted_and_not_reads_on_a_gpu(lookup: str, kind: str) -> None:
    steps_of_some_rows(make_lookup(lookup, ROWS, DIM, optimizer_of(kind), GPU), GPU)


def assert_stored(table: Lookup, expected_RD: Tensor) -> None:
    """As they are, or as one of the two neighbours among numbers of 16 bits."""
    error = 1.3e-6 if table.weight_RD.dtype == torch.float32 else torch.finfo(table.weight_RD.dtype).eps
    torch.testing.assert_close(table.weight_RD.float(), expected_RD, rtol=error, atol=1e-5)


@pytest.mark.parametrize(("lookup", "dtype"), ANY_DTYPE)
def test_rows_without_weights_come_as_they_are_and_are_stepped(lookup: str, dtype: torch.dtype) -> None:
    device = device_of(lookup)
    rows_H = torch.tensor([4, 0, 4, 29], dtype=torch.int32)
    hits = on(device, Hits.uniform(rows_H, None, size=1))
    table = make_lookup(lookup, ROWS, DIM, ValueOptimizer(0.3, 1e-8), device, dtype)
    table.set_learning_rate(0.1)
    table.weight_RD.copy_(torch.randn(ROWS, DIM))
    values_RD = table.weight_RD.to(torch.float32, copy=True)
    naive = NaiveOptimizer(table.optimizer, values_RD)
    assert torch.equal(table.read(hits, update_follows=True), values_RD[rows_H])
    gradient_GD = torch.randn(4, DIM).to(device)
    assert table.update(hits, gradient_GD) is None
    gradient_RD = torch.zeros_like(values_RD).index_add_(0, hits.rows_H, gradient_GD)
    naive.step(values_RD, gradient_RD, hits.rows_H, 0.1)
    assert_stored(table, values_RD)
    assert_state(table, naive)


def on(device: torch.device, hits: Hits) -> Hits:
    weights_H = None if hits.weights_H is None else hits.weights_H.to(device)
    return Hits(hits.rows_H.to(device), weights_H, hits.offsets_G1.to(device), hits.size)


@pytest.mark.parametrize("lookup", LOOKUPS)
@pytest.mark.parametrize("bags", [6, 0])
def test_bags_that_are_known_to_be_uniform_give_the_same(lookup: str, bags: int) -> None:
    device = device_of(lookup)
    jagged = on(device, hits_of([3] * bags))
    uniform = Hits.uniform(jagged.rows_H, jagged.weights_H, size=3)
    assert torch.equal(uniform.offsets_G1, jagged.offsets_G1) and torch.equal(uniform.bag_H(), jagged.bag_H())
    if lookup == "triton":
        uniform.offsets_G1 = torch.full_like(jagged.offsets_G1, -1)  # not to be looked at
    values_RD, gradient_GD = torch.randn(ROWS, DIM), torch.randn(bags, DIM, device=device)
    found = []
    for hits in (uniform, jagged):
        table = make_lookup(lookup, ROWS, DIM, ValueOptimizer(0.3, 1e-8), device)
        table.weight_RD.copy_(values_RD)
        found.append([table.read(hits), table.update(hits, gradient_GD), table.weight_RD, table.state.moment_R])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


STEPS = 16


def stepped(lookup: str, dtype: torch.dtype, seed: int) -> Tensor:
    """A table of 1.5 after STEPS steps, each of a sixteenth of the distance to the next number."""
    device = device_of(lookup)
    table = make_lookup(lookup, ROWS, DIM, ValueOptimizer(torch.finfo(dtype).eps / 16), device, dtype, seed)
    table.weight_RD.fill_(1.5)
    hits = on(device, Hits.uniform(torch.arange(ROWS, dtype=torch.int32), None, size=1))
    for _ in range(STEPS):
        table.state.moment_R.zero_()
        table.update(hits, torch.ones(ROWS, DIM, device=device))
    return table.weight_RD.float().cpu()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("lookup", ["reference", "triton"])
def test_steps_too_small_for_16_bits_add_up(lookup: str, dtype: torch.dtype) -> None:
    random_state = torch.get_rng_state()
    weight_RD = stepped(lookup, dtype, seed=3)
    assert torch.equal(torch.get_rng_state(), random_state)
    moves_RD = (1.5 - weight_RD) / torch.finfo(dtype).eps
    assert torch.equal(moves_RD, moves_RD.round())
    # binomial: mean 1, deviation 0.97 a value, 0.06 of the mean; one noise for all steps would move some 16 times
    assert abs(moves_RD.mean() - 1) < 0.2 and abs(moves_RD.std() - 0.97) < 0.2 and moves_RD.max() < 8
    assert torch.equal(stepped(lookup, dtype, seed=3), weight_RD)
    assert not torch.equal(stepped(lookup, dtype, seed=4), weight_RD)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("x", [1.001, -0.30001, 3e-5, -1e-7, 1000.3])
def test_rounding_at_random_is_right_in_the_mean(x: float, dtype: torch.dtype) -> None:
    samples = 20_000
    rounded = round_at_random(torch.full((samples,), x), dtype, torch.Generator().manual_seed(0)).double()
    below, above = rounded.min(), rounded.max()
    up, down = torch.tensor([float("inf"), -float("inf")], dtype=dtype)
    nearest = torch.tensor(x, dtype=dtype)
    neighbours = [float(torch.nextafter(nearest, way)) for way in (up, down)]
    assert below < x < above and len(rounded.unique()) == 2
    assert float(nearest) in (below, above) and {float(below), float(above)} <= {float(nearest), *neighbours}
    share = (x - below) / (above - below)
    deviation = (above - below) * (share * (1 - share) / samples).sqrt()
    assert abs(rounded.mean() - x) < 4 * deviation


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_leaves_what_needs_none(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    torch.testing.assert_close(round_at_random(every.float(), dtype, generator), every, rtol=0, atol=0, equal_nan=True)


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


@pytest.mark.parametrize(
    ("dtype", "device", "chosen", "refusal"),
    [
        (torch.bfloat16, CPU, "reference", "FBGEMM stores no values of bf16"),
        (torch.float16, CPU, "reference", "on a CPU FBGEMM rounds fp16 to the nearest, which loses small steps"),
        (torch.bfloat16, GPU, "reference", "FBGEMM stores no values of bf16"),
        (torch.float16, GPU, "fbgemm", None),
    ],
)
def test_fbgemm_is_not_chosen_for_values_that_it_cannot_step(
    dtype: torch.dtype, device: torch.device, chosen: str, refusal: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookups, "why_no_triton", lambda _: "it is old")
    assert choose_lookup("auto", device, DIM, dtype) == chosen
    if refusal is None:
        assert choose_lookup("fbgemm", device, DIM, dtype) == "fbgemm"
    else:
        with pytest.raises(InputError, match=f"^memory.lookup=fbgemm: {refusal}; set memory.lookup to auto or ref"):
            choose_lookup("fbgemm", device, DIM, dtype)


def test_auto_goes_past_fbgemm_for_an_optimizer_that_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "why_no_triton", lambda _: "it is old")
    assert choose_lookup("auto", CPU, DIM, optimizer="sgd") == "fbgemm"
    assert choose_lookup("auto", CPU, DIM, optimizer="rowwise_adam") == "reference"
    assert choose_lookup("auto", GPU, DIM, optimizer="rowwise_adam") == "fbgemm"
    with pytest.raises(InputError) as refusal:
        choose_lookup("fbgemm", CPU, DIM, optimizer="rowwise_adam")
    assert str(refusal.value) == (
        "memory.lookup=fbgemm: on a CPU FBGEMM has no rowwise_adam (optimizer.values.kind); "
        "set memory.lookup to auto or reference"
    )


def test_an_optimizer_that_there_is_not_is_refused() -> None:
    with pytest.raises(InputError, match=r"kind='adam'\): no such kind; use one of rowwise_adagrad, sgd, rowwise_ad"):
        ValueOptimizer(kind="adam")


def test_auto_leaves_the_interpreter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "why_no_triton", lambda _: None)
    monkeypatch.setattr(lookups, "interpreted", lambda: True)
    assert choose_lookup("auto", GPU, DIM) == "fbgemm"


def test_values_too_wide_for_the_kernels_go_to_another_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "why_no_triton", lambda _: None)
    monkeypatch.setattr(lookups, "interpreted", lambda: False)
    assert choose_lookup("auto", GPU, 4100) == "fbgemm"
    assert choose_lookup("auto", GPU, 4100, torch.bfloat16) == "reference"
    with pytest.raises(InputError, match="memory.lookup=triton: the kernels take values up to 4096 wide, and these "):
        choose_lookup("triton", GPU, 4100)
