"""The LayerNorm of queries and of keys against torch's in float64."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from msn_dist.kernels import sizes
from msn_dist.kernels.axis_norm import (
    TYPES,
    keys_gradients,
    normalised_keys,
    normalised_queries,
    queries_gradients,
)
from triton_device import DEVICE

ERROR = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
EPS = 1e-5
ROUNDED = 2**-22 * EPS**-0.5  # what a constant row, whose gradient is zero, makes of roundings
# M, H, E: one block of rows, several, and parts of one
SHAPES = [(1, 1, 1), (33, 2, 1), (7, 3, 20), (129, 1, 64), (31, 2, 100), (3, 3, 256), (5, 1, 255), (300, 3, 64)]
ODD = (math.inf, -math.inf, math.nan)


def operands(shape: tuple[int, int, int], x_dtype: torch.dtype, y_dtype: torch.dtype) -> list[Tensor]:
    """Projection, gamma, beta, and the gradient of the queries."""
    queries, heads, width = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(DEVICE)

    x_MX = (3 * draw(queries, 2 * heads * width) + 1).to(x_dtype)
    return [x_MX, 1 + draw(2, width), draw(2, width), draw(2, *shape).to(y_dtype)]


def passes(x_MX: Tensor, gamma_AE: Tensor, beta_AE: Tensor, g_AMHE: Tensor) -> list[Tensor]:
    """Queries and the gradients of projection, gamma and beta."""
    queries_AMHE = normalised_queries(x_MX, gamma_AE, beta_AE, EPS, g_AMHE.dtype)
    return [queries_AMHE, *queries_gradients(x_MX, gamma_AE, EPS, g_AMHE)]


def formula(x_MX: Tensor, gamma_AE: Tensor, beta_AE: Tensor) -> Tensor:
    """By torch, in the dtype of the operands."""
    width = gamma_AE.shape[1]
    xhat_MAHE = functional.layer_norm(x_MX.unflatten(1, (2, -1, width)), (width,), eps=EPS)
    return (xhat_MAHE * gamma_AE[:, None] + beta_AE[:, None]).transpose(0, 1)


def exact(x_MX: Tensor, gamma_AE: Tensor, beta_AE: Tensor, g_AMHE: Tensor) -> list[Tensor]:
    given = [operand.double().requires_grad_() for operand in (x_MX, gamma_AE, beta_AE)]
    queries_AMHE = formula(*given)
    return [queries_AMHE.detach(), *torch.autograd.grad(queries_AMHE, given, g_AMHE.double())]


def assert_exact(found: list[Tensor], given: list[Tensor]) -> None:
    x_MX, *_, g_AMHE = given
    dtypes = g_AMHE.dtype, x_MX.dtype, torch.float32, torch.float32
    for one, other, dtype in zip(found, exact(*given), dtypes, strict=True):
        assert one.dtype == dtype and one.is_contiguous()
        error = ERROR[dtype]
        least = ROUNDED if g_AMHE.shape[3] == 1 else 1e-5  # rows of one number are constant
        small = error * float(other.nan_to_num(0, 0, 0).abs().mean()) if other.numel() else 0
        torch.testing.assert_close(one.double(), other, rtol=error, atol=max(small, least), equal_nan=True)


@pytest.mark.parametrize(("x_dtype", "y_dtype"), [*product(TYPES, TYPES)])
def test_every_pair_of_dtypes_equals_the_formula(x_dtype: torch.dtype, y_dtype: torch.dtype) -> None:
    given = operands((33, 2, 20), x_dtype, y_dtype)
    found = passes(*given)
    assert_exact(found, given)
    assert all(torch.equal(one, other) for one, other in zip(found, passes(*given), strict=True)), "repeats"


@pytest.mark.parametrize("shape", SHAPES)
def test_every_size_equals_the_formula(shape: tuple[int, int, int]) -> None:
    given = operands(shape, torch.float32, torch.float32)
    assert_exact(passes(*given), given)


@pytest.mark.parametrize("programs", [1, 2, 3])
def test_programs_that_share_the_rows_add_up_all_of_them(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = operands((150, 1, 64), torch.float32, torch.float32)
    assert sizes.norm_programs((150, 1, 64)) == 5
    monkeypatch.setattr(sizes, "NORM_PROGRAMS", programs)
    assert_exact(passes(*given), given)


def test_no_query_leaves_parameters_a_gradient_of_zero() -> None:
    given = operands((0, 2, 20), torch.bfloat16, torch.float32)
    queries_AMHE, dx_MX, dgamma_AE, dbeta_AE = passes(*given)
    assert queries_AMHE.shape == (2, 0, 2, 20) and dx_MX.shape == (0, 80)
    assert torch.equal(dgamma_AE, torch.zeros(2, 20, device=DEVICE)) and torch.equal(dbeta_AE, dgamma_AE)


@pytest.mark.parametrize(("x_dtype", "y_dtype"), [*product(TYPES, TYPES)])
@pytest.mark.parametrize("shape", [(3, 33, 20), (1, 300, 64), (2, 1, 1)])
def test_keys_of_each_head_and_axis_equal_the_formula(
    shape: tuple[int, int, int], x_dtype: torch.dtype, y_dtype: torch.dtype
) -> None:
    """Keys are queries whose heads are their rows: only where they lie differs."""
    heads, sub_keys, width = shape
    x_MX, *norm, g_AMHE = operands((sub_keys, heads, width), x_dtype, y_dtype)
    keys_AHNE = x_MX.unflatten(1, (2, heads, width)).permute(1, 2, 0, 3).contiguous()
    g_AHNE = g_AMHE.transpose(1, 2).contiguous()
    found_AHNE = normalised_keys(keys_AHNE, *norm, EPS, y_dtype)
    dx_AHNE, dgamma_AE, dbeta_AE = keys_gradients(keys_AHNE, norm[0], EPS, g_AHNE)
    dx_MX = dx_AHNE.permute(2, 0, 1, 3).reshape(x_MX.shape)
    queries_AMHE = found_AHNE.transpose(1, 2).contiguous()
    assert_exact([queries_AMHE, dx_MX, dgamma_AE, dbeta_AE], [x_MX, *norm, g_AMHE])


def test_operands_of_any_strides_equal_the_formula() -> None:
    given = operands((9, 2, 20), torch.float32, torch.float32)
    turned = [operand.transpose(0, 1).contiguous().transpose(0, 1) for operand in given]
    stepped = [operand.repeat_interleave(2, -1)[..., ::2] for operand in given]
    part = [torch.cat([given[0], given[0]], 1)[:, : given[0].shape[1]], *given[1:]]
    shared = [*given[:3], given[3][:1, :1, :1, :1].expand(given[3].shape)]
    for strided in (turned, stepped, part, shared):
        assert_exact(passes(*strided), strided)


@pytest.mark.parametrize("width", [1, 20, 64])
def test_constant_rows_are_beta(width: int) -> None:
    given = operands((5, 2, width), torch.float32, torch.float32)
    given[0][1:3] = torch.tensor([[0.0], [8.0]], device=DEVICE)  # their mean is exact
    found = passes(*given)
    for queries_MHE, beta_E in zip(found[0], given[2], strict=True):
        assert torch.equal(queries_MHE[1:3], beta_E.expand(2, 2, width))
    assert all(result.isfinite().all() for result in found)


def test_nan_and_infinity_stay_in_their_row_and_reach_its_gradient() -> None:
    for where, odd in product((0, 3), ODD):
        given = operands((5, 3, 20), torch.float32, torch.float32)
        if where == 0:
            given[0][2, 20 + 3] = odd  # of the row axis's second head
        else:
            given[3][0, 2, 1, 3] = odd
        (row_MHE, col_MHE), dx_MX, dgamma_AE, dbeta_AE = passes(*given)
        dx_row_MHE, dx_col_MHE = (half_MY.unflatten(1, (3, 20)) for half_MY in dx_MX.clone().chunk(2, 1))
        assert not dx_row_MHE[2, 1].isfinite().any() and row_MHE[2, 1].isnan().all() == (where == 0)
        dx_row_MHE[2, 1] = 0
        row_MHE[2, 1] = 0
        for result in (row_MHE, col_MHE, dx_row_MHE, dx_col_MHE, dgamma_AE[1], dbeta_AE[1]):
            assert result.isfinite().all()
        assert not dgamma_AE[0].isfinite().all(), "as in torch"


def test_every_output_and_partial_sum_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, empty_like = torch.empty, torch.empty_like
    given = operands((33, 3, 20), torch.bfloat16, torch.float32)
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(math.nan))
    monkeypatch.setattr(torch, "empty_like", lambda tensor: empty_like(tensor).fill_(math.nan))
    found = passes(*given)
    monkeypatch.undo()
    assert_exact(found, given)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(gamma=torch.ones(4)), r"gamma is \[4\] and beta \[2, 4\]: give both as \[2, E\]"),
        (dict(beta=torch.ones(2, 5)), r"gamma is \[2, 4\] and beta \[2, 5\]"),
        (dict(x=torch.zeros(3, 12)), r"queries are \[3, 12\]: give \[M, 2 \* H \* 4\]"),
        (dict(x=torch.zeros(3, 2, 8)), r"queries are \[3, 2, 8\]"),
        (dict(gamma=torch.ones(2, 300), beta=torch.ones(2, 300)), "the kernels take E from 1 to 256, and it is 300"),
        (dict(gamma=torch.ones(2, 4).double()), "gamma is torch.float64 on cpu: give torch.float32"),
        (dict(x=torch.zeros(3, 8).double()), "x is torch.float64: give one of"),
        (dict(dtype=torch.float64), "dtype is torch.float64: give one of"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_fix(change: dict[str, object], says: str) -> None:
    given = dict(x=torch.zeros(3, 8), gamma=torch.ones(2, 4), beta=torch.ones(2, 4), dtype=torch.float32) | change
    with pytest.raises(ValueError, match=says):
        normalised_queries(given["x"], given["gamma"], given["beta"], EPS, given["dtype"])


def test_keys_of_another_shape_are_refused_with_the_fix() -> None:
    norm = torch.ones(2, 4), torch.zeros(2, 4)
    for shape in ((3, 4), (1, 3, 5, 4), (2, 3, 5, 8)):
        with pytest.raises(ValueError, match=r"keys are \[.*\]: give \[2, H, N, 4\]"):
            normalised_keys(torch.zeros(shape), *norm, EPS, torch.float32)


@pytest.mark.gpu
def test_queries_beyond_two_to_the_31_elements() -> None:
    x_MX = torch.ones(2**24 + 1, 128, dtype=torch.bfloat16, device=DEVICE)
    x_MX[-1, 64:] = torch.arange(64, device=DEVICE)
    gamma_AE, beta_AE = (torch.ones(2, 64, device=DEVICE) for _ in range(2))
    queries_AMHE = normalised_queries(x_MX, gamma_AE, beta_AE, EPS, torch.bfloat16)
    row_MHE, col_MHE = queries_AMHE
    assert bool((row_MHE[-2:] == 1).all()) and bool((col_MHE[-2] == 1).all())
    torch.testing.assert_close(
        col_MHE[-1:].float(), formula(x_MX[-1:].float(), gamma_AE, beta_AE)[1], rtol=0.01, atol=0
    )
    dx_MX, *_ = queries_gradients(x_MX, gamma_AE, EPS, queries_AMHE)
    assert bool(dx_MX[-2:].isfinite().all()) and bool((dx_MX[:2] == 0).all())
