"""Weighted rows summed where their hits point, and the gradients of a gather, against torch and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from msn_dist.kernels import reference, segments, sparse_scatter
from msn_dist.kernels.sparse_scatter import gather_backward, scatter_sum
from triton_device import DEVICE


@pytest.mark.parametrize("row_dtype", [torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("out_rows", [3, 40])
def test_scattered_sums_are_the_naive_ones(row_dtype: torch.dtype, out_rows: int) -> None:
    generator = torch.Generator().manual_seed(3)
    source_GD = torch.randn(60, 12, generator=generator)
    rows_GL = torch.randint(out_rows - 1, (60, 4), generator=generator)
    weights_GL = torch.rand(60, 4, generator=generator)
    products_HD = (weights_GL[..., None] * source_GD[:, None]).flatten(0, 1).double()
    expected_RD = torch.zeros(out_rows, 12, dtype=torch.float64).index_add(0, rows_GL.flatten(), products_HD)
    given = source_GD.to(DEVICE), rows_GL.to(row_dtype).to(DEVICE), weights_GL.to(DEVICE)
    out_RD = scatter_sum(*given, out_rows)
    torch.testing.assert_close(out_RD.double().cpu(), expected_RD, rtol=1e-5, atol=1e-5)
    assert not out_RD[-1].any()
    assert torch.equal(out_RD, scatter_sum(*given, out_rows))


@pytest.mark.parametrize("row_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("out_rows", [2**15, 2**15 + 1, 2**16, 2**16 + 1])
def test_rows_around_16_bits_are_sums_of_their_own(out_rows: int, row_dtype: torch.dtype) -> None:
    rows_8 = torch.tensor([0, 1, 2**15 - 1, 2**15, 2**15 + 1, 2**16 - 2, 2**16 - 1, 2**16]).clamp_max(out_rows - 1)
    rows_GL = rows_8[torch.randint(8, (60, 4), generator=torch.Generator().manual_seed(5))]
    source_GD = torch.arange(60.0)[:, None].expand(60, 3).contiguous()
    expected_RD = torch.zeros(out_rows, 3).index_add(0, rows_GL.flatten(), source_GD.repeat_interleave(4, 0))
    out_RD = scatter_sum(source_GD.to(DEVICE), rows_GL.to(row_dtype).to(DEVICE), None, out_rows)
    assert torch.equal(out_RD.cpu(), expected_RD)  # whole numbers


def test_scattering_nothing_gives_zeros() -> None:
    rows_GL = torch.zeros(0, 4, dtype=torch.int32, device=DEVICE)
    assert torch.equal(
        scatter_sum(torch.zeros(0, 8, device=DEVICE), rows_GL, None, 5), torch.zeros(5, 8, device=DEVICE)
    )


@pytest.mark.parametrize(("width", "row_dtype"), [(1, torch.int64), (12, torch.int32), (100, torch.int64)])
@pytest.mark.parametrize("rows", [1, 7, 240], ids=["one row", "few rows", "each row once"])
def test_the_gradients_of_a_gather_are_those_of_autograd(rows: int, width: int, row_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    values_RD = torch.randn(rows, width, generator=generator)
    rows_GL = (torch.randperm(240, generator=generator) % rows).view(60, 4)
    weights_GL = torch.rand(60, 4, generator=generator)
    gradient_GD = torch.randn(60, width, generator=generator)
    exact = [values_RD.double().requires_grad_(), weights_GL.double().requires_grad_()]
    pooled_GD = reference.weighted_bags(exact[0], rows_GL.flatten(), torch.arange(0, 241, 4), exact[1].flatten())
    pooled_GD.backward(gradient_GD.double())
    given = [x.to(DEVICE) for x in (values_RD, rows_GL.to(row_dtype), weights_GL, gradient_GD)]
    for once in {False, rows == 240}:
        found = gather_backward(*given, once=once)
        for one, truth in zip(found, exact, strict=True):
            assert one.dtype == torch.float32
            torch.testing.assert_close(one.double().cpu(), truth.grad, rtol=1e-5, atol=1e-5)
        assert all(map(torch.equal, found, gather_backward(*given, once=once)))


@pytest.mark.parametrize("rows", [50, 2**15 + 9, 2**16 + 9], ids=["2 bytes", "2 bytes without a sign", "4 bytes"])
def test_rows_without_a_hit_have_zeros_where_not_all_are_hit(rows: int) -> None:
    """Keys of a table whose number of rows stays as it is are sorted in as few bytes as they need."""
    generator = torch.Generator().manual_seed(rows)
    rows_GL = rows - 1 - torch.randint(20, (60, 4), generator=generator)
    rows_GL[0, 0] = 0
    gradient_GD = torch.randint(8, (60, 12), generator=generator).float()
    values_RD = torch.ones(rows, 12)
    found_RD, found_GL = gather_backward(
        *(x.to(DEVICE) for x in (values_RD, rows_GL, torch.ones(60, 4), gradient_GD)), all_hit=False
    )
    expected_RD = torch.zeros(rows, 12).index_add_(0, rows_GL.flatten(), gradient_GD.repeat_interleave(4, 0))
    assert torch.equal(found_RD.cpu(), expected_RD)  # whole numbers
    assert torch.equal(found_GL.cpu(), gradient_GD.sum(1, keepdim=True).expand(60, 4))


def test_a_gather_of_nothing_has_no_gradients() -> None:
    nothing_GL = torch.zeros(0, 4, dtype=torch.int64, device=DEVICE)
    nothing_RD = torch.zeros(0, 8, device=DEVICE)
    for once in (False, True):
        gradient_RD, gradient_GL = gather_backward(nothing_RD, nothing_GL, nothing_GL.float(), nothing_RD, once=once)
        assert gradient_RD.shape == (0, 8) and gradient_GL.shape == (0, 4)


def test_every_gradient_of_a_gather_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(*size: int, **options: object) -> Tensor:
        return torch.full(size, float("nan"), **options)

    monkeypatch.setattr(torch, "empty", poisoned)
    rows_GL = torch.arange(160, device=DEVICE).view(40, 4)
    for rows, once in ((3, False), (160, True)):
        values_RD = torch.ones(rows, 12, device=DEVICE)
        found = gather_backward(values_RD, rows_GL % rows, None, torch.ones(40, 12, device=DEVICE), once=once)
        assert all(one.isfinite().all() for one in found)


@pytest.mark.parametrize("once", [False, True])
def test_what_is_compiled_for_rows_that_came_does_not_depend_on_their_number(
    monkeypatch: pytest.MonkeyPatch, once: bool
) -> None:
    """Their number is another one in every step, and compiling takes about a second."""
    launched = []

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]):
            return lambda *given, **constants: launched.append(
                ([getattr(one, "dtype", type(one)) for one in given], constants)
            )

    for module, name in (
        (sparse_scatter, "scatter_sum_kernel"),
        (segments, "sum_chunks_kernel"),
        (segments, "sum_groups_kernel"),
    ):
        monkeypatch.setattr(module, name, Recorded())
    hits_GL = torch.arange(2**17).view(-1, 2)
    of_rows = []
    for rows in (2**14, 2**15 + 1, 2**17):
        gather_backward(torch.zeros(rows, 4), hits_GL % rows, None, torch.zeros(len(hits_GL), 4), once=once)
        of_rows.append(launched[:])
        launched.clear()
    assert of_rows[0] and of_rows[0] == of_rows[1] == of_rows[2]


def test_a_source_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="rows are of 2 bags and source has 3 rows"):
        scatter_sum(torch.zeros(3, 6), torch.zeros(2, 3, dtype=torch.int32), None, 5)


def test_a_gradient_that_does_not_fit_its_gather_is_refused() -> None:
    rows_GL = torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"gradient is \[2, 5\] on cpu: give \[G, 6\] on cpu"):
        gather_backward(torch.zeros(4, 6), rows_GL, None, torch.zeros(2, 5))
    with pytest.raises(ValueError, match="values are torch.int8"):
        gather_backward(torch.zeros(4, 6, dtype=torch.int8), rows_GL, None, torch.zeros(2, 6))
