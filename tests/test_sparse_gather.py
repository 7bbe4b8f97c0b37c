"""The Sparse-Gather kernel against the naive sums in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from msn_dist.kernels import reference
from msn_dist.kernels.sparse_gather import (
    OUT_TYPES,
    VALUE_TYPES,
    GatherShape,
    gated_sparse_gather,
    launch_shape,
    sparse_gather,
)
from triton_device import DEVICE

ROWS = 30
UNIFORM = [5] * 7
JAGGED = [3, 0, 17, 1, 0, 6]


def table(dtype: torch.dtype, width: int, seed: int = 0) -> tuple[Tensor, Tensor | None, Tensor]:
    """values_RD, scale_R and what they stand for, float64."""
    generator = torch.Generator().manual_seed(seed)
    values_RD = torch.randn(ROWS, width, generator=generator)
    if dtype == torch.int8:
        values_RD = (values_RD * 50).clamp(-127, 127)
    values_RD = values_RD.to(dtype).to(DEVICE)
    exact_RD = values_RD.double()
    if dtype not in (torch.int8, torch.float8_e4m3fn):
        return values_RD, None, exact_RD
    scale_R = torch.rand(ROWS, generator=generator).to(DEVICE)
    return values_RD, scale_R, exact_RD * scale_R[:, None].double()


def bags(lengths: list[int], row_dtype: torch.dtype = torch.int64, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """rows_H, weights_H and offsets_G1."""
    generator = torch.Generator().manual_seed(seed)
    rows_H = torch.randint(ROWS, (sum(lengths),), generator=generator).to(row_dtype)
    offsets_G1 = torch.tensor([0, *lengths]).cumsum(0)
    return rows_H.to(DEVICE), torch.rand(len(rows_H), generator=generator).to(DEVICE), offsets_G1.to(DEVICE)


def assert_pooled(actual_GD: Tensor, exact_RD: Tensor, rows_H: Tensor, offsets_G1: Tensor, weights_H: Tensor) -> None:
    expected_GD = reference.weighted_bags(exact_RD, rows_H.long(), offsets_G1, weights_H.double())
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[actual_GD.dtype]
    scale = max(1.0, exact_RD.abs().max().item())
    torch.testing.assert_close(actual_GD.double(), expected_GD, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("out_dtype", OUT_TYPES)
@pytest.mark.parametrize("dtype", VALUE_TYPES)
def test_every_dtype_gives_the_naive_sums(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    values_RD, scale_R, exact_RD = table(dtype, 8)
    rows_H, weights_H, offsets_G1 = bags(JAGGED)
    pooled_GD = sparse_gather(values_RD, rows_H, weights_H, offsets_G1, scale_R=scale_R, out_dtype=out_dtype)
    assert pooled_GD.dtype == out_dtype
    assert_pooled(pooled_GD, exact_RD, rows_H, offsets_G1, weights_H)


@pytest.mark.parametrize("width", [1, 4, 5, 12, 64, 100, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_width_gives_the_naive_sums(width: int, dtype: torch.dtype) -> None:
    values_RD, _, exact_RD = table(dtype, width)
    rows_H, weights_H, offsets_G1 = bags(UNIFORM)
    pooled_GD = sparse_gather(values_RD, rows_H.view(7, 5), weights_H.view(7, 5))
    assert_pooled(pooled_GD, exact_RD, rows_H, offsets_G1, weights_H)


@pytest.mark.parametrize("width", [1000, 4096])
def test_wide_rows_are_taken_whole(width: int) -> None:
    values_RD, _, exact_RD = table(torch.float16, width)
    rows_H, weights_H, offsets_G1 = bags([3, 3])
    pooled_GD = sparse_gather(values_RD, rows_H.view(2, 3), weights_H.view(2, 3))
    assert_pooled(pooled_GD, exact_RD, rows_H, offsets_G1, weights_H)


@pytest.mark.parametrize("row_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_and_weights_of_any_dtype(row_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    values_RD, _, exact_RD = table(torch.float32, 8)
    rows_H, weights_H, offsets_G1 = bags(UNIFORM, row_dtype)
    weights_H = weights_H.to(weight_dtype)
    pooled_GD = sparse_gather(values_RD, rows_H.view(7, 5), weights_H.view(7, 5))
    assert_pooled(pooled_GD, exact_RD, rows_H, offsets_G1, weights_H)


@pytest.mark.parametrize("size", [1, 2, 8, 11, 64])
def test_every_bag_size_gives_the_naive_sums(size: int) -> None:
    values_RD, _, exact_RD = table(torch.bfloat16, 4)
    rows_H, weights_H, offsets_G1 = bags([size] * 3)
    pooled_GD = sparse_gather(values_RD, rows_H.view(3, size), weights_H.view(3, size))
    assert_pooled(pooled_GD, exact_RD, rows_H, offsets_G1, weights_H)


def test_without_weights_every_hit_weighs_one() -> None:
    values_RD, _, exact_RD = table(torch.float32, 8)
    rows_H, _, offsets_G1 = bags(JAGGED)
    ones_H = torch.ones(len(rows_H), device=DEVICE)
    assert_pooled(sparse_gather(values_RD, rows_H, None, offsets_G1), exact_RD, rows_H, offsets_G1, ones_H)
    assert_pooled(
        sparse_gather(values_RD, rows_H[:5][None]), exact_RD, rows_H[:5], offsets_G1.new_tensor([0, 5]), ones_H[:5]
    )
    assert torch.equal(sparse_gather(values_RD, rows_H), values_RD[rows_H])


@pytest.mark.parametrize("shape", [GatherShape(1, 1, 1), GatherShape(4, 2, 2), GatherShape(16, 16, 4)])
def test_the_launch_does_not_change_the_result(shape: GatherShape) -> None:
    values_RD, _, exact_RD = table(torch.bfloat16, 12)
    for lengths in (UNIFORM, JAGGED):
        rows_H, weights_H, offsets_G1 = bags(lengths)
        pooled_GD = sparse_gather(values_RD, rows_H, weights_H, offsets_G1, shape=shape)
        assert_pooled(pooled_GD, exact_RD, rows_H, offsets_G1, weights_H)


def test_launches_keep_every_thread_at_work() -> None:
    for width in (4, 64, 100, 128, 1024, 4096):
        for value_bytes in (1, 2, 4):
            shape = launch_shape(width, 32, value_bytes)
            assert shape.bags * shape.hits * max(1, width * value_bytes // 16) >= 32 and 1 <= shape.hits <= 32


def test_no_bags_no_hits_and_empty_bags_give_zeros() -> None:
    values_RD, _, _ = table(torch.float32, 8)
    empty = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert sparse_gather(values_RD, empty.view(0, 4)).shape == (0, 8)
    assert sparse_gather(values_RD, empty, None, torch.zeros(1, dtype=torch.int64, device=DEVICE)).shape == (0, 8)
    none_G1 = torch.zeros(6, dtype=torch.int64, device=DEVICE)
    for pooled_GD in (sparse_gather(values_RD, empty.view(5, 0)), sparse_gather(values_RD, empty, None, none_G1)):
        assert torch.equal(pooled_GD, torch.zeros(5, 8, device=DEVICE))


def test_nan_and_infinity_stay_in_the_bags_that_hit_them() -> None:
    values_RD, _, _ = table(torch.float32, 8)
    values_RD[3], values_RD[4] = float("nan"), float("inf")
    rows_GL = torch.tensor([[1, 2], [3, 1], [5, 6], [4, 7], [2, 1]], device=DEVICE)
    pooled_GD = sparse_gather(values_RD, rows_GL, torch.ones(5, 2, device=DEVICE))
    assert pooled_GD[1].isnan().all() and pooled_GD[3].isposinf().all()
    assert pooled_GD[[0, 2, 4]].isfinite().all()


def test_runs_repeat_to_the_bit() -> None:
    values_RD, _, _ = table(torch.bfloat16, 12)
    rows_H, weights_H, offsets_G1 = bags(JAGGED)
    first_GD, second_GD = (sparse_gather(values_RD, rows_H, weights_H, offsets_G1) for _ in range(2))
    assert torch.equal(first_GD, second_GD)


def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(*size: int, **options: object) -> Tensor:
        return torch.full(size, float("nan"), **options)

    values_RD, _, _ = table(torch.float32, 5)
    rows_H, weights_H, offsets_G1 = bags(JAGGED)
    monkeypatch.setattr(torch, "empty", poisoned)
    assert sparse_gather(values_RD, rows_H, weights_H, offsets_G1).isfinite().all()


@pytest.mark.parametrize("dtype", OUT_TYPES)
def test_the_gate_is_x_times_tanh_of_the_sums(dtype: torch.dtype) -> None:
    values_RD, scale_R, exact_RD = table(torch.int8, 12)
    rows_H, weights_H, offsets_G1 = bags(JAGGED)
    x_GD = torch.randn(len(JAGGED), 12, generator=torch.Generator().manual_seed(2)).to(dtype).to(DEVICE)
    gated_GD = gated_sparse_gather(x_GD, values_RD, rows_H, weights_H, offsets_G1, scale_R=scale_R)
    pooled_GD = reference.weighted_bags(exact_RD, rows_H, offsets_G1, weights_H.double())
    assert gated_GD.dtype == dtype
    torch.testing.assert_close(gated_GD, (x_GD.double() * pooled_GD.tanh()).to(dtype))


def test_the_gate_keeps_the_digits_of_small_large_and_odd_sums() -> None:
    sums_R1 = torch.tensor(
        [0.0, 1e-30, -1e-6, 1e-3, 0.2499, -0.25, 0.3, -1.5, 20.0, -200.0, float("inf"), float("nan")]
    )
    sums_R1 = sums_R1[:, None].to(DEVICE)
    rows_G = torch.arange(len(sums_R1), device=DEVICE)
    gated_G1 = gated_sparse_gather(torch.ones_like(sums_R1), sums_R1, rows_G)
    torch.testing.assert_close(gated_G1.double(), sums_R1.double().tanh(), rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(values_RD=torch.zeros(4, 6).T), "strides"),
        (dict(values_RD=torch.zeros(4, 6, dtype=torch.float64)), "float64"),
        (dict(values_RD=torch.zeros(4, 4097)), "4097 wide"),
        (dict(values_RD=torch.zeros(4, 6, dtype=torch.int8)), "give scale_R"),
        (dict(scale_R=torch.ones(3)), r"scale_R is torch.float32 \[3\]"),
        (dict(rows=torch.zeros(2, 3)), "rows are torch.float32"),
        (dict(rows=torch.zeros(2, 3, 1, dtype=torch.int32), weights=None), r"\[2, 3, 1\]"),
        (dict(weights=torch.zeros(3, 2)), r"weights are torch.float32 \[3, 2\]"),
        (dict(weights=torch.zeros(2, 3, dtype=torch.int32)), "floating"),
        (dict(offsets_G1=torch.zeros(3, dtype=torch.int64)), r"\[2, 3\]: give them one after the other"),
        (dict(rows=torch.zeros(3).int(), weights=None, offsets_G1=torch.zeros(3).int()), "give int64"),
        (dict(out_dtype=torch.float64), "out_dtype"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_fix(change: dict[str, object], says: str) -> None:
    given = dict(values_RD=torch.zeros(4, 6), rows=torch.zeros(2, 3, dtype=torch.int64), weights=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=says):
        sparse_gather(**{**given, **change})


def test_an_x_of_another_shape_is_refused() -> None:
    rows_GL = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"x is torch.float32 \[3, 6\] .* give floating \[2, 6\]"):
        gated_sparse_gather(torch.zeros(3, 6), torch.zeros(4, 6), rows_GL)


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31_elements() -> None:
    rows, width = 2**25 + 3, 64
    values_RD = torch.zeros(rows, width, dtype=torch.bfloat16, device=DEVICE)
    values_RD[-8:] = torch.arange(8 * width, device=DEVICE).view(8, width).bfloat16()
    rows_GL = torch.arange(rows - 8, rows, device=DEVICE).view(2, 4)
    for row_dtype in (torch.int32, torch.int64):
        expected_GD = values_RD[-8:].float().view(2, 4, width).sum(1)
        assert torch.equal(sparse_gather(values_RD, rows_GL.to(row_dtype)), expected_GD)
