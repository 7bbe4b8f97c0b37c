"""Both ways to the gradients of a retrieval against autograd in float64; repeated runs, and poisoned scratch.

Shape suffixes: M queries, H heads, N sub-keys of an axis, E key width of one half, K hits.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from retrieval_cases import (
    BF16,
    FP16,
    FP32,
    Operands,
    assert_same,
    joined,
    operands,
    retrieve,
    retrieve_backward,
    scores_of,
)  # fmt: skip
from torch import Tensor

from msn_dist.kernels import key_gradient, reference, retrieval
from triton_device import DEVICE


@pytest.fixture(params=["compared", "sorted"])
def backward(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Either way to the gradients, whatever the size."""
    monkeypatch.setattr(key_gradient, "fits", lambda keys_AHNE: request.param == "compared")
    return request.param


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_runs_repeat_to_the_bit(dtype: torch.dtype, backward: str) -> None:
    given = operands(70, 1, 130, 16, dtype)
    found = retrieve(*given, 8, 0.25)
    assert_same(found, retrieve(*given, 8, 0.25))
    gradients = [retrieve_backward(*given, *found, found[1].square(), 0.25) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize(("queries", "heads", "sub_keys", "k"), [(70, 1, 130, 5), (3, 2, 40, 32)])
def test_scratch_memory_and_outputs_are_written_before_they_are_read(
    queries: int, heads: int, sub_keys: int, k: int, monkeypatch: pytest.MonkeyPatch, backward: str
) -> None:
    def poisoned(*size: int, dtype: torch.dtype | None = None, **options: object) -> Tensor:
        dtype = dtype or FP32
        # of packed candidates the upper half is NaN, which sorts first; a row so large would lie outside of a table
        value = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
        return torch.full(size[0] if isinstance(size[0], Sequence) else size, value, dtype=dtype, **options)

    def run() -> tuple[Tensor, ...]:
        found = retrieve(*given, k, 0.25)
        return *found, *retrieve_backward(*given, *found, found[1].square(), 0.25)

    given = operands(queries, heads, sub_keys, 20)
    expected = run()
    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x, **kw: poisoned(x.shape, dtype=x.dtype, device=DEVICE))
    assert all(torch.equal(one, other) for one, other in zip(run(), expected, strict=True))


def assert_gradients(given: Operands, slots_MHK: Tensor, tau: float) -> None:
    """`retrieve_backward` at any slots against autograd in float64."""
    exact = [operand.double().requires_grad_() for operand in given]
    weights_MHK = scores_of(slots_MHK, exact, tau).softmax(-1)
    gradient_MHK = torch.randn(slots_MHK.shape, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    expected = torch.autograd.grad(weights_MHK, exact, gradient_MHK.double())
    gradients = retrieve_backward(*given, slots_MHK, weights_MHK.detach().float(), gradient_MHK, tau)
    assert_close_gradients(gradients, expected, given)


def assert_close_gradients(gradients: Sequence[Tensor], expected: Sequence[Tensor], given: Operands) -> None:
    # a rounded result is off by half of the last bit, or by all of it in the interpreter, which cuts bfloat16 off
    tolerance = {FP32: 1e-5, BF16: 2**-7, FP16: 2**-10}[given[0].dtype]
    for gradient, true, operand in zip(gradients, expected, given, strict=True):
        of_queries = operand is given[0] or operand is given[1]
        assert gradient.dtype == (operand.dtype if of_queries else FP32) and gradient.shape == operand.shape
        scale = true.abs().max().item()
        torch.testing.assert_close(gradient.double(), true, rtol=tolerance, atol=tolerance * 0.1 * scale)


@pytest.mark.parametrize(
    ("queries", "heads", "sub_keys", "width", "k", "dtype"),
    [
        (5, 2, 40, 16, 3, FP32),
        (70, 1, 40, 20, 8, FP32),
        (5, 2, 130, 64, 32, BF16),
        (33, 3, 40, 16, 5, FP16),
        (1, 1, 2, 1, 1, FP32),
        (9, 1, 256, 64, 32, BF16),
        (5, 1, 60, 130, 50, BF16),
    ],
)
def test_gradients_are_those_of_the_reference(
    queries: int, heads: int, sub_keys: int, width: int, k: int, dtype: torch.dtype, backward: str
) -> None:
    given = operands(queries, heads, sub_keys, width, dtype)
    tau = width**-0.5
    exact = [operand.double().requires_grad_() for operand in given]
    slots_MHK, weights_MHK = reference.retrieve(*joined(exact), k, tau)
    gradient_MHK = torch.randn(slots_MHK.shape, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    expected = torch.autograd.grad(weights_MHK, exact, gradient_MHK.double())
    gradients = retrieve_backward(*given, slots_MHK, weights_MHK.detach().float(), gradient_MHK, tau)
    assert_close_gradients(gradients, expected, given)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_hits_that_share_a_key_add_up_in_its_gradient(dtype: torch.dtype, backward: str) -> None:
    given = operands(9, 2, 40, 16, dtype)
    generator = torch.Generator().manual_seed(2)
    row_MHK = torch.randint(3, (9, 2, 8), generator=generator)  # of 3 rows, the rest get nothing
    slots_MHK = (row_MHK * 40 + torch.arange(8) * 5).to(DEVICE)
    assert_gradients(given, slots_MHK, 0.25)


def test_a_key_that_every_query_hits_gets_all_their_gradients(backward: str) -> None:
    given = operands(200, 1, 40, 16)
    slots_MHK = torch.randint(1600, (200, 1, 4), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    slots_MHK[..., 0] = 17 * 40 + 5
    assert_gradients(given, slots_MHK, 0.25)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_gradients_of_its_own_hits(
    poison: float, dtype: torch.dtype, backward: str
) -> None:
    given = operands(5, 2, 40, 16, dtype)
    given[0][3, 1, 7] = poison
    slots_MHK, weights_MHK = retrieve(*given, 4, 0.25)
    row_MHE, col_MHE, *of_keys = retrieve_backward(*given, slots_MHK, weights_MHK, torch.ones_like(weights_MHK), 0.25)
    for of_queries in (row_MHE, col_MHE):
        spoiled_MH = of_queries.isnan().all(-1)
        assert spoiled_MH[3, 1] and spoiled_MH.sum() == 1 and of_queries[~spoiled_MH].isfinite().all()
    for gradient_HNE, hit_K in zip(of_keys, (slots_MHK[3, 1] // 40, slots_MHK[3, 1] % 40), strict=True):
        spoiled_HN = gradient_HNE.isnan().all(-1)
        assert spoiled_HN[1].nonzero().flatten().tolist() == hit_K.unique().tolist() and not spoiled_HN[0].any()
        assert gradient_HNE[~spoiled_HN].isfinite().all()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_an_infinite_key_leaves_the_gradients_of_queries_that_do_not_hit_it(dtype: torch.dtype, backward: str) -> None:
    given = operands(6, 1, 40, 16, dtype)
    given[0][:3, 0, 5], given[0][3:, 0, 5] = 1.0, -1.0
    given[2][0, 17, 5] = float("inf")
    slots_MHK, weights_MHK = retrieve(*given, 4, 0.25)
    assert (slots_MHK[:3] // 40 == 17).all() and (slots_MHK[3:] // 40 != 17).all()
    gradients = retrieve_backward(*given, slots_MHK, weights_MHK, torch.ones_like(weights_MHK), 0.25)
    for of_queries in gradients[:2]:
        assert of_queries[:3].isnan().all() and of_queries[3:].isfinite().all()


@pytest.mark.parametrize("programs", [2, 6])
@pytest.mark.parametrize("queries", [64, 130, 200])
def test_queries_are_split_over_any_number_of_programs(queries: int, programs: int) -> None:
    given = operands(queries, 1, 40, 16)
    slots_MHK = torch.randint(1600, (queries, 1, 4), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    weights_MHK = scores_of(slots_MHK, given, 0.25).softmax(-1)
    found = slots_MHK, weights_MHK, weights_MHK.square()
    shape = key_gradient.Shape(queries=32, warps=4, programs=programs)
    compared = key_gradient.gradients(*joined(given), *found, 0.25, shape)
    for one, other in zip(compared, retrieval.sorted_gradients(*joined(given), *found, 0.25), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(("queries", "sub_keys", "width", "k", "dtype"), [
    (5000, 256, 64, 32, BF16),
    (5000, 100, 48, 100, BF16),
    (5000, 128, 128, 128, BF16),
    (5000, 64, 256, 16, BF16),
    (5000, 128, 64, 32, FP32),
    (5000, 32, 256, 32, FP32),
    (5000, 100, 48, 17, FP16),
])  # fmt: skip
def test_either_backward_is_exact_at_every_launch(
    queries: int, sub_keys: int, width: int, k: int, dtype: torch.dtype, backward: str
) -> None:
    given = operands(queries, 2, sub_keys, width, dtype)
    slots_MHK, _ = retrieve(*given, k, width**-0.5)
    assert_gradients(given, slots_MHK, width**-0.5)
