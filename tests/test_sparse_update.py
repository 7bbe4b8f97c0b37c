"""The fused backward and optimizer step against autograd and the naive optimizers in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from msn_dist.kernels import reference
from msn_dist.kernels.segments import CHUNK, GROUP, TileShape, tile_shape
from msn_dist.kernels.sparse_update import RowState, RowwiseAdagrad, RowwiseAdam, Rule, Sgd, sparse_update
from triton_device import DEVICE

ROWS = 30
UNIFORM = [5] * 12
JAGGED = [3, 0, 17, 1, 0, 26, 6]
RULES = [Sgd(0.1), RowwiseAdagrad(0.1, 1e-6), RowwiseAdam(0.1, 3, 1e-6, 0.8, 0.9)]
rules = pytest.mark.parametrize("rule", RULES, ids=[type(rule).__name__ for rule in RULES])


@dataclass
class Case:
    values_RD: Tensor
    moment_R: Tensor
    first_RD: Tensor
    rows_H: Tensor
    weights_H: Tensor
    offsets_G1: Tensor
    gradient_GD: Tensor

    def state(self, rule: Rule) -> RowState:
        return RowState(
            None if isinstance(rule, Sgd) else self.moment_R, self.first_RD if isinstance(rule, RowwiseAdam) else None
        )

    def copy(self) -> Case:
        return Case(*(tensor.clone() for tensor in vars(self).values()))

    def update(self, rule: Rule, **options: object) -> Tensor | None:
        return sparse_update(
            self.values_RD,
            self.state(rule),
            self.rows_H,
            self.weights_H,
            self.offsets_G1,
            self.gradient_GD,
            rule,
            **options,
        )


def case(lengths: list[int], width: int = 12, dtype: torch.dtype = torch.float32, rows: int = ROWS) -> Case:
    """Random numbers; the hits repeat rows inside a bag and over bags."""
    generator = torch.Generator().manual_seed(width)
    tensors = (
        torch.randn(rows, width, generator=generator).to(dtype),
        torch.rand(rows, generator=generator),
        torch.randn(rows, width, generator=generator),
        torch.randint(rows, (sum(lengths),), generator=generator),
        torch.rand(sum(lengths), generator=generator),
        torch.tensor([0, *lengths]).cumsum(0),
        torch.randn(len(lengths), width, generator=generator),
    )
    return Case(*(tensor.to(DEVICE) for tensor in tensors))


def naive(given: Case, rule: Rule) -> tuple[Case, Tensor]:
    """What the step must leave behind, and the gradient of the weights, in float64."""
    exact = Case(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in vars(given.copy()).values()))
    values_RD, weights_H = exact.values_RD.clone().requires_grad_(), exact.weights_H.clone().requires_grad_()
    reference.weighted_bags(values_RD, exact.rows_H, exact.offsets_G1, weights_H).backward(exact.gradient_GD)
    hit_X = exact.rows_H.unique().long()
    match rule:
        case Sgd():
            reference.sgd_(exact.values_RD, values_RD.grad, rule.lr)
        case RowwiseAdagrad():
            reference.rowwise_adagrad_(exact.values_RD, exact.moment_R, values_RD.grad, rule.lr, rule.eps)
        case RowwiseAdam():
            kept = exact.values_RD, exact.first_RD, exact.moment_R
            stepped = [tensor[hit_X] for tensor in kept]
            numbers = rule.lr, rule.eps, rule.beta1, rule.beta2, rule.step
            reference.rowwise_adam_(*stepped, values_RD.grad[hit_X], *numbers)
            for tensor, of_rows in zip(kept, stepped, strict=True):
                tensor[hit_X] = of_rows
    return exact, weights_H.grad


def assert_as_naive(given: Case, rule: Rule, **options: object) -> None:
    expected, expected_H = naive(given, rule)
    before = given.copy()
    weights_gradient_H = given.update(rule, **options)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[given.values_RD.dtype]
    torch.testing.assert_close(given.values_RD.double(), expected.values_RD, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(given.moment_R.double(), expected.moment_R, rtol=5e-6, atol=1e-6)
    torch.testing.assert_close(given.first_RD.double(), expected.first_RD, rtol=5e-6, atol=1e-5)
    assert weights_gradient_H.dtype == torch.float32
    torch.testing.assert_close(weights_gradient_H.double(), expected_H, rtol=5e-6, atol=1e-5)
    untouched_R = torch.ones(len(given.values_RD), dtype=torch.bool, device=DEVICE)
    untouched_R[given.rows_H] = False
    for name in ("values_RD", "moment_R", "first_RD"):
        assert torch.equal(getattr(given, name)[untouched_R], getattr(before, name)[untouched_R])


@rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_rule_and_dtype_steps_as_the_naive_one(rule: Rule, dtype: torch.dtype) -> None:
    assert_as_naive(case(JAGGED, dtype=dtype), rule)


@pytest.mark.parametrize("width", [1, 4, 5, 64, 100, 256])
def test_every_width_steps_as_the_naive_one(width: int) -> None:
    assert_as_naive(case(JAGGED, width), RULES[1])


def test_wide_rows_are_taken_whole() -> None:
    for width in (1000, 4096):
        assert_as_naive(case([2, 3], width, rows=3), RULES[2])


def test_state_carries_over_three_steps() -> None:
    given = case(JAGGED)
    for step in (1, 2, 3):
        assert_as_naive(given, RowwiseAdam(0.1, step))


@pytest.mark.parametrize("row_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("other_dtype", [torch.bfloat16, torch.float16])
def test_rows_weights_and_gradients_of_other_dtypes(row_dtype: torch.dtype, other_dtype: torch.dtype) -> None:
    given = case(UNIFORM)
    given.weights_H, given.gradient_GD = given.weights_H.to(other_dtype), given.gradient_GD.to(other_dtype)
    expected, expected_H = naive(given, RULES[1])
    given.rows_H = given.rows_H.to(row_dtype)
    weights_gradient_H = given.update(RULES[1])
    torch.testing.assert_close(given.values_RD.double(), expected.values_RD, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(weights_gradient_H.double(), expected_H, rtol=5e-6, atol=1e-5)


def test_uniform_bags_are_those_that_offsets_describe() -> None:
    jagged, uniform = case(UNIFORM), case(UNIFORM)
    by_offsets_H = jagged.update(RULES[1])
    by_shape_GL = sparse_update(
        uniform.values_RD,
        uniform.state(RULES[1]),
        uniform.rows_H.view(12, 5),
        uniform.weights_H.view(12, 5),
        None,
        uniform.gradient_GD,
        RULES[1],
    )
    assert torch.equal(by_shape_GL, by_offsets_H.view(12, 5))
    assert torch.equal(uniform.values_RD, jagged.values_RD)


def test_without_weights_every_hit_weighs_one() -> None:
    ones, none = case(JAGGED), case(JAGGED)
    ones.weights_H = torch.ones_like(ones.weights_H)
    none.weights_H = None
    assert torch.equal(ones.update(RULES[1]), none.update(RULES[1]))
    assert torch.equal(ones.values_RD, none.values_RD)


def test_the_gradient_of_the_weights_can_be_left_out() -> None:
    with_it, without = case(JAGGED), case(JAGGED)
    with_it.update(RULES[2])
    assert without.update(RULES[2], of_weights=False) is None
    assert torch.equal(with_it.values_RD, without.values_RD)


@pytest.mark.parametrize(
    "tile",
    [
        TileShape(1, 1),
        TileShape(1, 8),
        TileShape(4, 4),
        TileShape(4, 2),
        TileShape(16, 32, 2),
        TileShape(32, 4, 4),
    ],
)
@pytest.mark.parametrize("rows", [1, 3])
def test_segments_of_many_chunks_are_summed_whole_by_every_tile(tile: TileShape, rows: int) -> None:
    assert_as_naive(case([5] * 21, 4, rows=rows), RULES[1], shape=tile)


def test_a_program_without_a_segment_takes_none_of_another() -> None:
    given = case([69], 4, rows=3)
    given.rows_H.zero_()[-1] = 2  # in the third program, in a short tile; none begins in the second
    assert_as_naive(given, RULES[1], shape=TileShape(4, 4))


def test_segments_of_every_length_are_summed_whole() -> None:
    # Rows 0, 1, 2, ... hit once, twice, ...: runs begin and end at every place of a tile and of a chunk.
    given = case([90] * 14, 4, rows=50)
    counts_R = torch.cat([torch.arange(1, 49), torch.tensor([84])])
    rows_H = torch.repeat_interleave(torch.arange(49), counts_R)
    given.rows_H = rows_H[torch.randperm(len(rows_H), generator=torch.Generator().manual_seed(0))].to(DEVICE)
    assert_as_naive(given, RULES[1])


@pytest.mark.parametrize("width", [2, pytest.param(64, marks=pytest.mark.gpu)])
def test_a_row_that_every_bag_hits_is_summed_by_groups(width: int) -> None:
    hits = 2 * GROUP.value + 5 * CHUNK.value + 7
    given = case([1] * hits, width, rows=2)
    given.rows_H = (torch.arange(hits, device=DEVICE) >= 70).long()
    expected, expected_H = naive(given, RULES[1])
    weights_gradient_H = given.update(RULES[1])
    torch.testing.assert_close(given.values_RD.double(), expected.values_RD, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(given.moment_R.double(), expected.moment_R, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights_gradient_H.double(), expected_H, rtol=5e-6, atol=1e-5)


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_without_hits_nothing_changes(lengths: list[int]) -> None:
    given = case(lengths)
    before = given.copy()
    assert given.update(RULES[1]).shape == (0,)
    assert torch.equal(given.values_RD, before.values_RD) and torch.equal(given.moment_R, before.moment_R)


def test_nan_in_a_row_or_a_gradient_reaches_no_other_row() -> None:
    given = case([2] * 20, 4)
    given.rows_H = torch.arange(40, device=DEVICE) % 20
    given.values_RD[3] = float("nan")
    given.gradient_GD[4] = float("nan")  # bag 4 hits rows 8 and 9
    weights_gradient_H = given.update(RULES[1])
    assert given.values_RD.isnan().all(1).nonzero().flatten().tolist() == [3, 8, 9]
    assert given.values_RD.isnan().any(1).sum() == 3
    assert weights_gradient_H.isnan().nonzero().flatten().tolist() == [3, 8, 9, 23]


@rules
def test_runs_repeat_to_the_bit(rule: Rule) -> None:
    first, second = (case([5] * 40, dtype=torch.bfloat16, rows=7) for _ in range(2))
    assert torch.equal(first.update(rule, rounding_seed=5), second.update(rule, rounding_seed=5))
    for name in ("values_RD", "moment_R", "first_RD"):
        assert torch.equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("start", [1.0, -3e-5])
def test_random_rounding_keeps_the_mean(dtype: torch.dtype, start: float) -> None:
    """A step of a third of the grid's spacing goes up a third of the time, also where float16 is subnormal."""
    rows, width = 64, 64
    grid = torch.tensor([start], dtype=dtype)
    spacing = (torch.nextafter(grid, torch.tensor([float("inf")], dtype=dtype)) - grid).item()
    values_RD = grid.expand(rows, width).to(DEVICE).contiguous()
    rows_G = torch.arange(rows, device=DEVICE)
    gradient_GD = torch.full((rows, width), -spacing / 3, device=DEVICE)
    sparse_update(values_RD, RowState(), rows_G, None, None, gradient_GD, Sgd(1.0), rounding_seed=7)
    moved_RD = (values_RD.double() - grid.item()) / spacing
    assert set(moved_RD.unique().tolist()) == {0.0, 1.0}
    assert abs(moved_RD.mean().item() - 1 / 3) < 4 * (2 / 9 / moved_RD.numel()) ** 0.5
    columns_D, rows_R = moved_RD.mean(0), moved_RD.mean(1)
    assert 0.1 < columns_D.min() and columns_D.max() < 0.6 and 0.1 < rows_R.min() and rows_R.max() < 0.6


def test_random_rounding_differs_by_seed_and_keeps_what_fits() -> None:
    def stepped(by: float, seed: int) -> Tensor:
        values_RD = torch.ones(8, 8, dtype=torch.bfloat16, device=DEVICE)
        rows_G = torch.arange(8, device=DEVICE)
        gradient_GD = torch.full((8, 8), -by, device=DEVICE)
        sparse_update(values_RD, RowState(), rows_G, None, None, gradient_GD, Sgd(1.0), rounding_seed=seed)
        return values_RD

    assert not torch.equal(stepped(0.003, 1), stepped(0.003, 2**40))
    assert (stepped(0.5, 3) == 1.5).all()
    assert stepped(float("inf"), 3).isposinf().all() and stepped(float("nan"), 3).isnan().all()


def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(*size: int, **options: object) -> Tensor:
        return torch.full(size, float("nan"), **options)

    given = case([5] * 45, 4, rows=3)
    monkeypatch.setattr(torch, "empty", poisoned)
    assert given.update(RULES[1]).isfinite().all()
    assert given.values_RD.isfinite().all()


def test_tiles_divide_a_chunk() -> None:
    for width in (1, 5, 64, 128, 1000, 4096):
        assert all(CHUNK.value % tile_shape(width, hits).hits == 0 for hits in (0.1, 1, 20, 70, 1000))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(values_RD=torch.zeros(4, 6, dtype=torch.int8)), "values are torch.int8"),
        (dict(gradient_GD=torch.zeros(2, 5)), r"gradient is torch.float32 \[2, 5\] .* give floating \[2, 6\]"),
        (dict(gradient_GD=torch.zeros(2, 6, dtype=torch.float64)), "gradient is torch.float64"),
        (dict(state=RowState()), "moment_R is None, and RowwiseAdagrad needs it"),
        (dict(state=RowState(torch.zeros(3))), r"moment_R is torch.float32 \[3\]"),
        (dict(state=RowState(torch.zeros(4, dtype=torch.float16))), "moment_R is torch.float16"),
        (dict(state=RowState(torch.zeros(4), torch.zeros(4, 6))), "first_RD is given"),
        (dict(rule=RowwiseAdam(0.1, 1)), "first_RD is None"),
        (dict(rule=RowwiseAdam(0.1, 0), state=RowState(torch.zeros(4), torch.zeros(4, 6))), "step is 0"),
        (dict(rounding_seed=1), "rounding_seed"),
        (dict(rows=torch.zeros(2, 3)), "rows are torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_fix(change: dict[str, object], says: str) -> None:
    given = dict(
        values_RD=torch.zeros(4, 6),
        state=RowState(torch.zeros(4)),
        rows=torch.zeros(2, 3, dtype=torch.int64),
        weights=torch.zeros(2, 3),
        offsets_G1=None,
        gradient_GD=torch.zeros(2, 6),
        rule=RowwiseAdagrad(0.1),
    )
    with pytest.raises(ValueError, match=says):
        sparse_update(**{**given, **change})


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31_elements() -> None:
    rows, width = 2**25 + 3, 64
    values_RD = torch.zeros(rows, width, dtype=torch.bfloat16, device=DEVICE)
    values_RD[-8:] = 1.0
    rows_GL = torch.arange(rows - 8, rows, device=DEVICE).view(4, 2)
    gradient_GD = torch.arange(4.0, device=DEVICE)[:, None].expand(4, width)
    weights_gradient_GL = sparse_update(values_RD, RowState(), rows_GL, None, None, gradient_GD, Sgd(1.0))
    assert torch.equal(values_RD[-8:].float(), 1.0 - gradient_GD.repeat_interleave(2, 0))
    assert torch.equal(weights_gradient_GL, width * gradient_GD[:, :2])
    assert not values_RD[:-8].any()
