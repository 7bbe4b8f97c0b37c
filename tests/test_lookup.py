"""The local look-ups against the naive formulas."""

from __future__ import annotations

import pytest
import torch

from msn_dist.kernels import reference
from msn_dist.sharding.hits import Hits, offsets_of
from msn_dist.sharding.lookup import LOOKUPS, ValueOptimizer, weights_gradient

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
    hits = hits_of([3, 0, 5, 1, 7])
    table = LOOKUPS[lookup](ROWS, DIM, ValueOptimizer(0.3, 1e-8), torch.device("cpu"))
    table.weight_RD.copy_(torch.randn(ROWS, DIM))
    values_RD, moment_R = table.weight_RD.clone().requires_grad_(), torch.zeros(ROWS)
    weights_H, gradient_GD = hits.weights_H.clone().requires_grad_(), torch.randn(5, DIM)
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
