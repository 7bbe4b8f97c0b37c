"""Bags at home: rows that came from their owners, weighted and added up, with the gradients of rows and weights.

By the kernels where the look-up is `triton`, else by torch.

Shape suffixes: A rows that came, D value width, M bags of this rank, L hits a bag.
"""

from __future__ import annotations

from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional as F

from msn_dist.sharding.lookup import Lookup


def home_bags(lookup: Lookup, rows_AD: Tensor, where_ML: Tensor, weights_ML: Tensor, once: bool) -> Tensor:
    """pooled_MD, float32: the sums of weights_ML * rows_AD[where_ML] over the hits of each bag; differentiable.

    rows_AD and weights_ML are float32, and so are their gradients; where_ML is int64.  Every row must be hit, and with
    `once` by one hit alone.
    """
    if lookup.name == "triton":
        return _HomeBags.apply(rows_AD, weights_ML, where_ML, lookup, once)
    return F.embedding_bag(where_ML, rows_AD, per_sample_weights=weights_ML, mode="sum")


class _HomeBags(Function):
    @staticmethod
    def forward(ctx, rows_AD, weights_ML, where_ML, lookup, once):
        ctx.lookup, ctx.once = lookup, once
        ctx.save_for_backward(rows_AD, weights_ML, where_ML)
        return lookup.gather(rows_AD, where_ML, weights_ML)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_MD):
        rows_AD, weights_ML, where_ML = ctx.saved_tensors
        gradients = ctx.lookup.gather_backward(rows_AD, where_ML, weights_ML, gradient_MD, ctx.once)
        return *gradients, None, None, None
