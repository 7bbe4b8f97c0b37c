"""The retrieval kernels against `reference.retrieve` in float64, and their order of ties against Python's sort.

Shape suffixes: M queries, H heads, N sub-keys of an axis, E key width of one half, K hits, J = K + 1 where there are
as many, X = M * H.
"""

from __future__ import annotations

import pytest
import torch
from retrieval_cases import (
    BF16,
    FP16,
    FP32,
    Found,
    Operands,
    assert_same,
    joined,
    operands,
    retrieve,
    retrieve_backward,
    scores_of,
)  # fmt: skip
from torch import Tensor

from msn_dist.kernels import reference, retrieval
from msn_dist.kernels.sizes import survivors_of
from msn_dist.kernels.survivors import survivors
from triton_device import DEVICE


def assert_retrieved(found: Found, given: Operands, k: int, tau: float, atol: float = 1e-6) -> float:
    """Slots are the reference's but where scores lie within 1e-5; returns the share of equal ones."""
    slots_MHK, weights_MHK = found
    exact = [operand.double() for operand in given]
    sub_keys = given[2].shape[1]
    true_slots_MHJ, true_weights_MHJ = reference.retrieve(*joined(exact), min(k + 1, sub_keys), tau)
    assert (slots_MHK.dtype, weights_MHK.dtype) == (torch.int64, FP32)
    assert slots_MHK.shape == weights_MHK.shape == true_slots_MHJ[..., :k].shape
    assert_distinct_and_inside(slots_MHK, sub_keys)
    true_weights_MHK = true_weights_MHJ[..., :k] / true_weights_MHJ[..., :k].sum(-1, keepdim=True)
    torch.testing.assert_close(weights_MHK.double(), true_weights_MHK, rtol=1e-5, atol=atol)

    best_MHK = scores_of(true_slots_MHJ[..., :k], exact, tau)
    torch.testing.assert_close(scores_of(slots_MHK, exact, tau), best_MHK, rtol=1e-5, atol=1e-5)
    apart_MHK = true_weights_MHJ.log().diff(dim=-1) < -1e-5  # from the next one
    if sub_keys == k:
        apart_MHK = torch.nn.functional.pad(apart_MHK, (0, 1), value=k == sub_keys**2)
    alone_MHK = apart_MHK & torch.nn.functional.pad(apart_MHK[..., :-1], (1, 0), value=True)
    equal_MHK = slots_MHK == true_slots_MHJ[..., :k]
    assert equal_MHK[alone_MHK].all()
    return equal_MHK.double().mean().item()


def assert_distinct_and_inside(slots_MHK: Tensor, sub_keys: int) -> None:
    assert slots_MHK.min() >= 0 and slots_MHK.max() < sub_keys**2
    assert (slots_MHK.sort(-1).values.diff(dim=-1) > 0).all()


def in_documented_order(given: Operands, k: int) -> Tensor:
    """slots_MHK of operands whose products and sums float32 holds exactly, sorted as the three steps say."""
    row_MHN, col_MHN = (
        torch.einsum("mhe,hne->mhn", queries.double(), keys.double())
        for queries, keys in zip(given[:2], given[2:], strict=True)
    )

    def slots_of(row_N: list[float], col_N: list[float]) -> list[int]:
        rows_K, cols_K = (sorted(range(len(s)), key=lambda c, s=s: (-s[c], c))[:k] for s in (row_N, col_N))
        pairs = [(-row_N[row] - col_N[col], i, j) for i, row in enumerate(rows_K) for j, col in enumerate(cols_K)]
        return [rows_K[i] * len(row_N) + cols_K[j] for _, i, j in sorted(pairs)[:k]]

    pairs_X = zip(row_MHN.flatten(0, 1).tolist(), col_MHN.flatten(0, 1).tolist(), strict=True)
    slots_XK = torch.tensor([slots_of(row_N, col_N) for row_N, col_N in pairs_X], device=DEVICE)
    return slots_XK.unflatten(0, row_MHN.shape[:2])


def overflowing() -> tuple[Operands, Tensor, int]:
    """(operands, columns that are queries 0's and 2's best, k): 21 columns in 7 groups (of columns equal modulo 128).

    As only 7 groups have high maxima, the 8th largest lets all of the 21 through, and 16 fit.
    """
    row_queries_MHE, col_queries_MHE, row_keys_HNE, col_keys_HNE = operands(4, 1, 390, 16)
    hot = torch.cat([torch.arange(first, first + 7) for first in (3, 131, 259)]).to(DEVICE)
    row_queries_MHE[:, 0, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    row_keys_HNE[:, :, 0] = 0.0
    row_keys_HNE[:, hot, 0] = 20.0
    return (row_queries_MHE, col_queries_MHE, row_keys_HNE, col_keys_HNE), hot, 8


@pytest.mark.parametrize(
    ("queries", "heads", "sub_keys", "width", "k", "dtype"),
    [
        (1, 1, 2, 1, 1, FP32),
        (5, 1, 2, 16, 2, BF16),
        (5, 2, 40, 16, 3, BF16),
        (5, 1, 40, 20, 40, FP16),
        (1, 1, 64, 16, 1, FP16),
        (70, 1, 64, 16, 8, BF16),
        (70, 2, 130, 20, 8, FP32),
        (5, 3, 130, 64, 32, BF16),
        (2, 1, 130, 130, 8, FP32),
        (5, 1, 300, 64, 32, FP32),
        (5, 1, 300, 20, 32, FP16),
        (2, 1, 256, 64, 50, FP32),
        (2, 1, 130, 16, 128, FP32),
    ],
)
def test_slots_and_weights_are_those_of_the_reference(
    queries: int, heads: int, sub_keys: int, width: int, k: int, dtype: torch.dtype
) -> None:
    given = operands(queries, heads, sub_keys, width, dtype)
    tau = width**-0.5
    assert assert_retrieved(retrieve(*given, k, tau), given, k, tau) > 0.99


def test_no_queries_give_no_slots() -> None:
    given = operands(0, 2, 40, 16)
    slots_MHK, weights_MHK = retrieve(*given, 3, 0.25)
    assert slots_MHK.shape == weights_MHK.shape == (0, 2, 3)
    gradients = retrieve_backward(*given, slots_MHK, weights_MHK, weights_MHK, 0.25)
    assert [gradient.shape for gradient in gradients] == [operand.shape for operand in given]
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("sub_keys", "k"), [(40, 8), (130, 5), (130, 32)])
def test_among_ties_lower_columns_and_better_rows_come_first(sub_keys: int, k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(k)
    shapes = [(5, 2, 16)] * 2 + [(2, sub_keys, 16)] * 2
    given = tuple(torch.randint(-1, 2, shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    slots_MHK, weights_MHK = retrieve(*given, k, 0.25)
    assert torch.equal(slots_MHK, in_documented_order(given, k))
    true_weights_MHK = scores_of(slots_MHK, [operand.double() for operand in given], 0.25).softmax(-1)
    torch.testing.assert_close(weights_MHK.double(), true_weights_MHK, rtol=1e-5, atol=1e-6)


def test_keys_that_are_equal_tie_by_their_columns() -> None:
    generator = torch.Generator().manual_seed(3)
    queries = [torch.randint(-8, 9, (5, 1, 16), generator=generator).to(DEVICE, FP32) for _ in range(2)]
    distinct = [torch.randint(-8, 9, (1, 10, 16), generator=generator).to(DEVICE, FP32) for _ in range(2)]
    given = (*queries, *(keys.repeat(1, 13, 1) for keys in distinct))
    assert torch.equal(retrieve(*given, 20, 0.125)[0], in_documented_order(given, 20))


def test_a_query_of_zeros_gets_the_first_columns_of_the_first_row() -> None:
    row_queries_MHE, col_queries_MHE, *keys = operands(5, 1, 130, 16)
    row_queries_MHE[2], col_queries_MHE[2] = 0.0, 0.0
    given = (row_queries_MHE, col_queries_MHE, *keys)
    slots_MHK, weights_MHK = retrieve(*given, 8, 0.25)
    assert slots_MHK[2, 0].tolist() == list(range(8))
    torch.testing.assert_close(weights_MHK[2, 0], torch.full((8,), 0.125, device=DEVICE))
    others = [0, 1, 3, 4]
    rest = (row_queries_MHE[others], col_queries_MHE[others], *keys)
    assert_retrieved((slots_MHK[others], weights_MHK[others]), rest, 8, 0.25)


def test_more_survivors_than_fit_change_nothing() -> None:
    given, hot, k = overflowing()
    fits_M = (survivors(given[:2], given[2:], k).count_AM[0, :4] <= survivors_of(k)).tolist()
    assert fits_M == [False, True, False, True]
    found = retrieve(*given, k, 0.25)
    assert_retrieved(found, given, k, 0.25)

    # the same columns in other places, 21 groups: all queries fit
    order = torch.cat([hot, torch.tensor([c for c in range(390) if c not in hot.tolist()], device=DEVICE)])
    spread = (*given[:2], given[2][:, order], given[3])
    assert (survivors(spread[:2], spread[2:], k).count_AM[0, :4] <= survivors_of(k)).all()
    slots_MHK, weights_MHK = retrieve(*spread, k, 0.25)
    assert torch.equal(found[0], order[slots_MHK // 390] * 390 + slots_MHK % 390)
    torch.testing.assert_close(found[1], weights_MHK, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_nan_in_a_query_stays_with_it(dtype: torch.dtype) -> None:
    given = operands(5, 2, 130, 16, dtype)
    clean_slots_MHK, clean_weights_MHK = retrieve(*given, 8, 0.25)
    given[0][3, 1, 7] = float("nan")
    slots_MHK, weights_MHK = retrieve(*given, 8, 0.25)
    assert weights_MHK[3, 1].isnan().all()
    assert_distinct_and_inside(slots_MHK, 130)
    clean_MH = torch.ones(5, 2, dtype=torch.bool, device=DEVICE)
    clean_MH[3, 1] = False
    assert_same((slots_MHK[clean_MH], weights_MHK[clean_MH]), (clean_slots_MHK[clean_MH], clean_weights_MHK[clean_MH]))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_key_with_nan_comes_first_and_spoils_the_weights(dtype: torch.dtype) -> None:
    given = operands(5, 2, 130, 16, dtype)
    columns_MHK = torch.einsum("mhe,hne->mhn", given[1].double(), given[3].double()).topk(8).indices
    given[2][1, 77, 3] = float("nan")
    slots_MHK, weights_MHK = retrieve(*given, 8, 0.25)
    assert torch.equal(slots_MHK[:, 1], 77 * 130 + columns_MHK[:, 1])
    assert weights_MHK[:, 1].isnan().all()
    finite = tuple(operand[:, :1] for operand in given[:2]) + tuple(operand[:1] for operand in given[2:])
    assert_retrieved((slots_MHK[:, :1], weights_MHK[:, :1]), finite, 8, 0.25)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("infinity", [float("inf"), float("-inf")])
def test_an_infinite_score_comes_first_or_never(infinity: float, dtype: torch.dtype) -> None:
    given = operands(6, 1, 130, 16, dtype)
    columns_MHK = torch.einsum("mhe,hne->mhn", given[1].double(), given[3].double()).topk(8).indices
    given[0][:3, 0, 5], given[0][3:, 0, 5] = 1.0, -1.0
    given[2][0, 77, 5] = infinity
    slots_MHK, weights_MHK = retrieve(*given, 8, 0.25)
    first, never = (slice(0, 3), slice(3, 6)) if infinity > 0 else (slice(3, 6), slice(0, 3))
    assert torch.equal(slots_MHK[first], 77 * 130 + columns_MHK[first])
    assert weights_MHK[first].isnan().all()  # inf - inf, as torch.softmax
    given[2][0, 77] = 0.0  # now a key that is not among the best of anybody
    rest = (given[0][never], given[1][never], *given[2:])
    assert_retrieved((slots_MHK[never], weights_MHK[never]), rest, 8, 0.25)


def test_strided_operands_give_the_same() -> None:
    given = joined(operands(5, 2, 40, 16))
    wide = tuple(torch.stack([operand, torch.full_like(operand, float("nan"))], -1)[..., 0] for operand in given)
    turned = tuple(operand.transpose(0, 2).contiguous().transpose(0, 2) for operand in given)
    found = retrieval.retrieve(*given, 3, 0.25)
    gradient_MHK = torch.randn(found[1].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected = retrieval.retrieve_backward(*given, *found, gradient_MHK, 0.25)
    turned_MHK = gradient_MHK.transpose(0, 2).contiguous().transpose(0, 2)
    for strided in (wide, turned):
        assert not any(operand.is_contiguous() for operand in strided)
        assert_same(retrieval.retrieve(*strided, 3, 0.25), found)
        gradients = retrieval.retrieve_backward(*strided, *found, turned_MHK, 0.25)
        assert all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))


def test_slices_of_the_queries_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # whole numbers, whose products are exact in any order
    given = tuple(operand.mul(4).round() for operand in operands(10, 2, 40, 16))
    whole = retrieve(*given, 3, 0.25)
    monkeypatch.setattr(retrieval, "RETRIEVED_AT_ONCE", 8)  # 4, 4 and 2 queries
    assert_same(retrieve(*given, 3, 0.25), whole)


def zeros(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            dict(queries_AMHE=zeros(2, 4, 8)),
            r"queries of shape \(2, 4, 8\) must have 4 dimensions, the first of them 2",
        ),
        (dict(keys_AHNE=zeros(3, 2, 6, 8)), r"keys of shape \(3, 2, 6, 8\) must have 4 dimensions"),
        (dict(queries_AMHE=zeros(2, 4, 2, 8, dtype=torch.float64)), "queries of torch.float64: the kernels take"),
        (dict(keys_AHNE=zeros(2, 2, 6, 8, dtype=BF16)), "keys are torch.bfloat16 on .*, but queries torch.float32 on"),
        (dict(queries_AMHE=zeros(2, 4, 2, 9)), r"queries end in \(2, 9\), but the keys have \(heads, E\) = \(2, 8\)"),
        (dict(k=0), "k=0 must be at least 1"),
        (dict(k=7), "k=7 must be at least 1 and at most 128 and the 6 sub-keys"),
        (dict(keys_AHNE=zeros(2, 2, 65537, 8)), "65537 sub-keys are more than the 65536"),
        (
            dict(queries_AMHE=zeros(2, 6, 6, 257), keys_AHNE=zeros(2, 6, 6, 257)),
            "keys of width 257 are wider than the 256",
        ),
        (dict(tau=0.0), "tau=0.0 must be positive"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], says: str) -> None:
    given = dict(queries_AMHE=zeros(2, 4, 2, 8), keys_AHNE=zeros(2, 2, 6, 8), k=3, tau=1.0)
    with pytest.raises(ValueError, match=says):
        retrieval.retrieve(**{**given, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(
    ("queries", "sub_keys", "width", "k", "equal"),
    [
        (4096, 1024, 64, 32, 0.999),
        (4096, 4096, 64, 32, 0.999),
        (4096, 32768, 64, 32, 0.999),
        (4096, 1024, 128, 64, 0.999),
        (4096, 256, 64, 32, 0.999),
        (256, 65536, 256, 128, 0.99),  # 128 of 2^32 scores lie close together
    ],
)
def test_large_shapes_are_exact(
    queries: int, sub_keys: int, width: int, k: int, equal: float, dtype: torch.dtype
) -> None:
    given = operands(queries, 1, sub_keys, width, dtype)
    tau = width**-0.5
    assert assert_retrieved(retrieve(*given, k, tau), given, k, tau, atol=1e-5) > equal


@pytest.mark.gpu
def test_more_queries_than_a_slice_are_exact() -> None:
    assert 200_000 > retrieval.RETRIEVED_AT_ONCE
    given = operands(200_000, 1, 256, 64, BF16)
    assert assert_retrieved(retrieve(*given, 8, 0.125), given, 8, 0.125, atol=1e-5) > 0.999
