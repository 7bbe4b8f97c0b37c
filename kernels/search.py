"""The whole search of a memory, from projected tokens and key codes to slots and weights, as one autograd function.

    queries = LN(projection)        keys = LN(Theta C)        slots, weights = retrieval(queries, keys)

Each step is a kernel or a small product.  One function for all of them, since what autograd does around a step takes
the host of a GPU as long as the step takes the GPU; and the keys' gradient stays float32 on its way to the codes.

Shape suffixes: A = 2 axes, M queries of a head, H heads, N sub-keys of an axis, E key width of one half, K hits,
X = A * H * E.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from msn_dist.kernels import axis_norm, retrieval


@dataclass(frozen=True)
class Search:
    """What is not a tensor: hits of a query, scale of the scores, the norms' eps, and whether Theta mixes sub-keys."""

    k: int
    tau: float
    eps: float
    mix: bool

    def __call__(
        self,
        projected_MX: Tensor,
        codes_AHNE: Tensor,
        theta: Tensor | None,
        query_norm: tuple[Tensor, Tensor],
        key_norm: tuple[Tensor, Tensor],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """slots_MHK (int64) and weights_MHK (float32), differentiable to all tensors that are given.

        theta: [A, H, N, N] if it mixes sub-keys, else [A, H, E, E], or None for 1.  Norms are (gamma_AE, beta_AE).
        Parameters are float32; queries and keys meet in `dtype`.  Sizes are those of `retrieval` and `axis_norm`, whose
        errors are raised.  Not for torch.compile, and not under autocast, where products would round.
        """
        return _Search.apply(projected_MX, codes_AHNE, theta, *query_norm, *key_norm, self, dtype)


class _Search(Function):
    @staticmethod
    def forward(ctx, projected_MX, codes_AHNE, theta, query_gamma, query_beta, key_gamma, key_beta, search, dtype):
        queries_AMHE = axis_norm.normalised_queries(projected_MX, query_gamma, query_beta, search.eps, dtype)
        mixed_AHNE = codes_AHNE
        if theta is not None:
            mixed_AHNE = theta @ codes_AHNE if search.mix else codes_AHNE @ theta.mT
        keys_AHNE = axis_norm.normalised_keys(mixed_AHNE, key_gamma, key_beta, search.eps, dtype)
        slots_MHK, weights_MHK = retrieval.retrieve(queries_AMHE, keys_AHNE, search.k, search.tau)
        ctx.search = search
        given = projected_MX, codes_AHNE, theta, query_gamma, key_gamma
        ctx.save_for_backward(*given, queries_AMHE, mixed_AHNE, keys_AHNE, slots_MHK, weights_MHK)
        ctx.set_materialize_grads(False)  # else zeros are made for the slots, which have no gradient
        ctx.mark_non_differentiable(slots_MHK)
        return slots_MHK, weights_MHK

    @staticmethod
    @once_differentiable
    def backward(ctx, _, g_MHK):
        if g_MHK is None:
            return (None,) * 9
        given, made = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        projected_MX, codes_AHNE, theta, query_gamma, key_gamma = given
        queries_AMHE, mixed_AHNE, keys_AHNE, *found = made
        eps, mix = ctx.search.eps, ctx.search.mix
        g_AMHE, g_AHNE = retrieval.retrieve_backward(queries_AMHE, keys_AHNE, *found, g_MHK, ctx.search.tau)
        of_queries = axis_norm.queries_gradients(projected_MX, query_gamma, eps, g_AMHE)
        g_AHNE, *of_key_norm = axis_norm.keys_gradients(mixed_AHNE, key_gamma, eps, g_AHNE)
        of_theta = None
        if theta is not None:
            of_theta = g_AHNE @ codes_AHNE.mT if mix else g_AHNE.mT @ codes_AHNE
            g_AHNE = theta.mT @ g_AHNE if mix else g_AHNE @ theta
        of_projection, *of_query_norm = of_queries
        return of_projection, g_AHNE, of_theta, *of_query_norm, *of_key_norm, None, None
