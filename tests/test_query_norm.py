"""The LayerNorm of the queries against torch's in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from msn_dist.config import MemoryConfig
from msn_dist.kernels import query_norm as kernel
from msn_dist.kernels import sizes
from msn_dist.kernels.query_norm import TYPES, query_norm
from msn_dist.memory import product_keys
from msn_dist.memory.product_keys import ProductKeys
from msn_dist.planner.gpu_rules import fused_query_norm
from msn_dist.planner.live_bytes import LiveBytes
from triton_device import DEVICE

ERROR = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
EPS = 1e-5
ROUNDED = 2**-22 * EPS**-0.5  # what a constant row, whose gradient is zero, makes of roundings
# M, H, E: one block of rows, several, and parts of one
SHAPES = [(1, 1, 1), (33, 2, 1), (7, 3, 20), (129, 1, 64), (31, 2, 100), (3, 3, 256), (5, 1, 255), (300, 3, 64)]
ODD = (math.inf, -math.inf, math.nan)


def operands(shape: tuple[int, int, int], x_dtype: torch.dtype, y_dtype: torch.dtype) -> list[Tensor]:
    """Projection, gamma, beta, and the gradients of both results."""
    queries, heads, width = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(DEVICE)

    x_MX = (3 * draw(queries, 2 * heads * width) + 1).to(x_dtype).requires_grad_()
    gamma_AE, beta_AE = (1 + draw(2, width)).requires_grad_(), draw(2, width).requires_grad_()
    return [x_MX, gamma_AE, beta_AE, *(draw(*shape).to(y_dtype) for _ in range(2))]


def passes(x_MX: Tensor, gamma_AE: Tensor, beta_AE: Tensor, g_row_MHE: Tensor, g_col_MHE: Tensor) -> list[Tensor]:
    """Both results and the gradients of projection, gamma and beta."""
    queries = query_norm(x_MX, gamma_AE, beta_AE, EPS, g_row_MHE.dtype)
    queries_of = [query.detach() for query in queries]
    return [*queries_of, *torch.autograd.grad(queries, (x_MX, gamma_AE, beta_AE), (g_row_MHE, g_col_MHE))]


def formula(x_MX: Tensor, gamma_AE: Tensor, beta_AE: Tensor) -> list[Tensor]:
    """By torch, in the dtype of the operands."""
    width = gamma_AE.shape[1]
    halves = (half_MY.unflatten(1, (-1, width)) for half_MY in x_MX.chunk(2, 1))
    return [
        functional.layer_norm(half_MHE, (width,), gamma_E, beta_E, EPS)
        for half_MHE, gamma_E, beta_E in zip(halves, gamma_AE, beta_AE, strict=True)
    ]


def exact(x_MX: Tensor, gamma_AE: Tensor, beta_AE: Tensor, *gradients: Tensor) -> list[Tensor]:
    given = [operand.detach().double().requires_grad_() for operand in (x_MX, gamma_AE, beta_AE)]
    queries = formula(*given)
    gradients_of_given = torch.autograd.grad(queries, given, [g_MHE.double() for g_MHE in gradients])
    return [*(query.detach() for query in queries), *gradients_of_given]


def assert_exact(found: list[Tensor], given: list[Tensor]) -> None:
    x_MX, *_, g_MHE = given
    dtypes = g_MHE.dtype, g_MHE.dtype, x_MX.dtype, torch.float32, torch.float32
    for one, other, dtype in zip(found, exact(*given), dtypes, strict=True):
        assert one.dtype == dtype and one.is_contiguous()
        error = ERROR[dtype]
        least = ROUNDED if x_MX.shape[1] == 2 * g_MHE.shape[1] else 1e-5  # rows of one number are constant
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
    row_MHE, col_MHE, dx_MX, dgamma_AE, dbeta_AE = passes(*given)
    assert row_MHE.shape == col_MHE.shape == (0, 2, 20) and dx_MX.shape == (0, 80)
    assert torch.equal(dgamma_AE, torch.zeros(2, 20, device=DEVICE)) and torch.equal(dbeta_AE, dgamma_AE)


def test_an_axis_that_nothing_learns_from_has_no_gradient() -> None:
    given = operands((9, 2, 20), torch.float32, torch.float32)
    row_MHE, _ = query_norm(*given[:3], EPS, torch.float32)
    found = torch.autograd.grad(row_MHE, given[:3], given[3])
    expected = exact(*given[:4], torch.zeros_like(given[4]))[2:]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def test_operands_of_any_strides_equal_the_formula() -> None:
    given = [operand.detach() for operand in operands((9, 2, 20), torch.float32, torch.float32)]
    turned = [operand.transpose(0, 1).contiguous().transpose(0, 1) for operand in given]
    stepped = [operand.repeat_interleave(2, -1)[..., ::2] for operand in given]
    part = [torch.cat([given[0], given[0]], 1)[:, : given[0].shape[1]], *given[1:]]
    shared = [*given[:3], *(g_MHE[:1, :1, :1].expand(g_MHE.shape) for g_MHE in given[3:])]
    for strided in (turned, stepped, part, shared):
        for operand in strided[:3]:
            operand.requires_grad_()
        assert_exact(passes(*strided), strided)


@pytest.mark.parametrize("width", [1, 20, 64])
def test_constant_rows_are_beta(width: int) -> None:
    given = operands((5, 2, width), torch.float32, torch.float32)
    given[0].data[1:3] = torch.tensor([[0.0], [8.0]], device=DEVICE)  # their mean is exact
    row_MHE, col_MHE, *_ = found = passes(*given)
    for queries_MHE, beta_E in zip((row_MHE, col_MHE), given[2], strict=True):
        assert torch.equal(queries_MHE[1:3], beta_E.expand(2, 2, width))
    assert all(result.isfinite().all() for result in found)


def test_nan_and_infinity_stay_in_their_row_and_reach_its_gradient() -> None:
    for where, odd in product((0, 3), ODD):
        given = operands((5, 3, 20), torch.float32, torch.float32)
        if where == 0:
            given[0].data[2, 20 + 3] = odd  # of the row axis's second head
        else:
            given[3][2, 1, 3] = odd
        row_MHE, col_MHE, dx_MX, dgamma_AE, dbeta_AE = passes(*given)
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
        (dict(x=torch.zeros(3, 12)), r"the projection is \[3, 12\]: give \[M, 2 \* H \* 4\]"),
        (dict(x=torch.zeros(3, 2, 8)), r"the projection is \[3, 2, 8\]"),
        (dict(gamma=torch.ones(2, 300), beta=torch.ones(2, 300)), "the kernels take E from 1 to 256, and it is 300"),
        (dict(gamma=torch.ones(2, 4).double()), "gamma is torch.float64 on cpu: give torch.float32"),
        (dict(x=torch.zeros(3, 8).double()), "the projection is torch.float64: give one of"),
        (dict(dtype=torch.float64), "dtype is torch.float64: give one of"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_fix(change: dict[str, object], says: str) -> None:
    given = dict(x=torch.zeros(3, 8), gamma=torch.ones(2, 4), beta=torch.ones(2, 4), dtype=torch.float32) | change
    with pytest.raises(ValueError, match=says):
        query_norm(given["x"], given["gamma"], given["beta"], EPS, given["dtype"])


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("heads", [1, 2])
def test_product_keys_with_the_kernel_learn_as_by_the_formula(
    heads: int, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_a_gpu(both_MX: Tensor, gamma_AE: Tensor, beta_AE: Tensor, eps: float, dtype: torch.dtype) -> list[Tensor]:
        with torch.autocast(DEVICE.type, enabled=False):  # as there: in float32, while a CPU's gives 16 bits
            return [queries_MHE.to(dtype) for queries_MHE in formula(both_MX.float(), gamma_AE, beta_AE)]

    results = []
    for chosen in (on_a_gpu, query_norm):
        monkeypatch.setattr(ProductKeys, "fused_norm", lambda self, both_BTX, chosen=chosen: chosen)
        torch.manual_seed(0)
        keys = ProductKeys(MemoryConfig(sub_keys=9, top_k=4, heads=heads, key_dim=20), width=16).to(DEVICE)
        x_BTD = torch.randn(6, 2, 16, device=DEVICE, requires_grad=True)
        g_BTHE = torch.randn(6, 2, heads, 20, device=DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            row_BTHE, col_BTHE = keys.queries(x_BTD, torch.bfloat16 if autocast else torch.float32)
            slots_BTHK, weights_BTHK = keys(x_BTD)
        loss = (row_BTHE * g_BTHE).sum() + (col_BTHE * g_BTHE.square()).sum()
        if not autocast:  # with 16 bits other slots may win: the interpreter cuts off where torch rounds
            loss = loss + (weights_BTHK.square() * torch.arange(4, device=DEVICE)).sum()
            results.append([slots_BTHK, weights_BTHK])
        else:
            results.append([])
        loss.backward()
        learnt = keys.query_XD, *keys.query_norm.parameters()
        results[-1] += [row_BTHE, col_BTHE, x_BTD.grad, *(parameter.grad for parameter in learnt)]
    error = 0.05 if autocast else 1e-5
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert (one - other).abs().max() <= error * max(1, other.abs().max())


def test_product_keys_of_torch_and_of_the_kernel_are_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without autocast, where a CPU does what a GPU does."""
    torch.manual_seed(0)
    keys = ProductKeys(MemoryConfig(sub_keys=9, top_k=4, heads=2, key_dim=20), width=16).to(DEVICE)
    for parameter in keys.query_norm.parameters():
        torch.nn.init.normal_(parameter)
    x_BTD = torch.randn(6, 2, 16, device=DEVICE)
    monkeypatch.setattr(ProductKeys, "fused_norm", lambda self, both_BTX: None)
    expected = *keys.queries(x_BTD, torch.float32), *keys(x_BTD)
    monkeypatch.setattr(ProductKeys, "fused_norm", lambda self, both_BTX: query_norm)
    for one, other in zip((*keys.queries(x_BTD, torch.float32), *keys(x_BTD)), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("on_gpu", "dtype", "no_triton", "changes", "fused"),
    [
        (True, torch.float32, None, {}, True),
        (True, torch.bfloat16, None, {}, True),
        (True, torch.float32, "it is old", {}, False),
        (True, torch.float64, None, {}, False),
        (False, torch.float32, None, {}, False),
        (True, torch.float32, None, {"layer_norm": False}, False),
        (True, torch.float32, None, {"key_dim": 257}, False),
    ],
)
def test_the_kernel_normalises_on_a_gpu_and_torch_elsewhere(
    on_gpu: bool,
    dtype: torch.dtype,
    no_triton: str | None,
    changes: dict[str, object],
    fused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(product_keys, "why_no_triton", lambda _: no_triton)
    monkeypatch.setattr(product_keys, "interpreted", lambda: False)
    keys = ProductKeys(MemoryConfig(**({"sub_keys": 9, "top_k": 4, "key_dim": 8} | changes)), width=8)
    both_BTX = SimpleNamespace(is_cuda=on_gpu, dtype=dtype, device=None)
    assert keys.fused_norm(both_BTX) is (query_norm if fused else None)


@pytest.mark.parametrize("shape", [(700, 2, 20), (1, 1, 64), (2100, 1, 256)])
def test_the_planner_counts_the_bytes_that_the_kernel_holds(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "_launch", lambda *_, **__: None)  # the interpreter has tensors of its own

    def held(function: Callable) -> list[tuple[int, int]]:
        x_MX, gamma_AE, beta_AE, *gradients = operands(shape, torch.bfloat16, torch.bfloat16)
        with LiveBytes(on_gpu=True) as bytes_:
            queries = function(x_MX * 1, gamma_AE * 1, beta_AE * 1, EPS, torch.bfloat16)
            after_forward = bytes_.live, bytes_.peak
            torch.autograd.backward(queries, gradients)
        return [after_forward, (bytes_.live, bytes_.peak)]

    assert held(query_norm) == held(partial(fused_query_norm, lambda *_: None))


@pytest.mark.gpu
def test_queries_beyond_two_to_the_31_elements() -> None:
    x_MX = torch.ones(2**24 + 1, 128, dtype=torch.bfloat16, device=DEVICE)
    x_MX[-1, 64:] = torch.arange(64, device=DEVICE)
    x_MX.requires_grad_()
    gamma_AE, beta_AE = (torch.ones(2, 64, device=DEVICE, requires_grad=True) for _ in range(2))
    row_MHE, col_MHE = query_norm(x_MX, gamma_AE, beta_AE, EPS, torch.bfloat16)
    assert bool((row_MHE[-2:] == 1).all()) and bool((col_MHE[-2] == 1).all())
    torch.testing.assert_close(
        col_MHE[-1:].float(), formula(x_MX[-1:].float(), gamma_AE, beta_AE)[1], rtol=0.01, atol=0
    )
    torch.autograd.backward((row_MHE, col_MHE), (row_MHE.detach(), col_MHE.detach()))
    assert bool(x_MX.grad[-2:].isfinite().all()) and bool((x_MX.grad[:2] == 0).all())
