"""The truth: naive PyTorch for every operator, in any floating dtype, on any device.

Every faster implementation is compared with these functions, in tests and before it is timed.

Shape suffixes: M queries, N sub-keys per axis, K slots read by one query, R rows of a value table,
D width of a value, G bags, H hits (all bags' entries one after the other).
"""

from __future__ import annotations

import torch
from torch import Tensor


def product_key_topk_naive(row_scores_MN: Tensor, col_scores_MN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top-k over all N * N slots, none left out.

    Returns scores_MK (descending) and slots_MK (int64, slot = row * N + col).
    """
    scores_MNN = row_scores_MN[:, :, None] + col_scores_MN[:, None, :]
    return scores_MNN.flatten(1).topk(k, dim=1)


def product_key_topk(row_scores_MN: Tensor, col_scores_MN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same result from the k best of each axis, with the pairs that can win only.

    With both lists sorted, (1-based) pair (i, j) is beaten by the i * j - 1 pairs above and to its
    left, so it can be in the top k only if i * j <= k: 119 of 1,024 pairs at k = 32.
    """
    row_best_MK, row_index_MK = row_scores_MN.topk(k, dim=1)
    col_best_MK, col_index_MK = col_scores_MN.topk(k, dim=1)
    i_C, j_C = pair_candidates(k, row_scores_MN.device)
    candidates_MC = row_best_MK.index_select(1, i_C) + col_best_MK.index_select(1, j_C)
    scores_MK, winners_MK = candidates_MC.topk(k, dim=1)
    row_MK = row_index_MK.gather(1, i_C[winners_MK])
    col_MK = col_index_MK.gather(1, j_C[winners_MK])
    return scores_MK, row_MK * row_scores_MN.shape[1] + col_MK


def retrieve(queries_AMHE: Tensor, keys_AHNE: Tensor, k: int, tau: float) -> tuple[Tensor, Tensor]:
    """slots_MHK (int64, row * N + column, best first) and weights_MHK, their softmax, float32 at least.

    A = 2 axes, row and column; H heads with their own sub-keys, E key width of one half.  Scores are (q . key) * tau,
    in float32 at least whatever the operands are: 16-bit scores would tie.  Differentiable through the weights.
    """
    dtype = torch.promote_types(queries_AMHE.dtype, torch.float32)
    with torch.autocast(queries_AMHE.device.type, enabled=False):
        row_MHN, col_MHN = (
            torch.einsum("mhe,hne->mhn", queries_MHE.to(dtype), keys_HNE.to(dtype)) * tau
            for queries_MHE, keys_HNE in zip(queries_AMHE, keys_AHNE, strict=True)
        )
    scores_XK, slots_XK = product_key_topk(row_MHN.flatten(0, 1), col_MHN.flatten(0, 1), k)
    shape_MH = row_MHN.shape[:2]
    return slots_XK.unflatten(0, shape_MH), scores_XK.softmax(dim=-1).unflatten(0, shape_MH)


def pair_candidates(k: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """0-based indices i_C, j_C (int64) of the pairs with (i + 1) * (j + 1) <= k."""
    one_to_k = torch.arange(1, k + 1, device=device)
    return torch.nonzero(one_to_k[:, None] * one_to_k <= k, as_tuple=True)


def weighted_bags(values_RD: Tensor, rows_H: Tensor, offsets_G1: Tensor, weights_H: Tensor) -> Tensor:
    """Weighted sum of the rows in each bag: bag g holds hits offsets[g] to offsets[g + 1] - 1.

    Returns pooled_GD in the dtype of `values_RD`; an empty bag gives zeros.  Differentiable to
    values and weights.
    """
    bags = len(offsets_G1) - 1
    bag_of_H = torch.repeat_interleave(torch.arange(bags, device=rows_H.device), offsets_G1.diff())
    hits_HD = values_RD[rows_H] * weights_H[:, None].to(values_RD.dtype)
    return values_RD.new_zeros(bags, values_RD.shape[1]).index_add(0, bag_of_H, hits_HD)


def weights_gradient(values_RD: Tensor, rows_H: Tensor, offsets_G1: Tensor, gradient_GD: Tensor) -> Tensor:
    """gradient_H of the weights of `weighted_bags`: the product of each hit's row with its bag's gradient."""
    bags = len(offsets_G1) - 1
    bag_of_H = torch.repeat_interleave(torch.arange(bags, device=rows_H.device), offsets_G1.diff())
    return (gradient_GD[bag_of_H] * values_RD[rows_H]).sum(1)


def gate(x_BTD: Tensor, v_BTD: Tensor, kind: str, dtype: torch.dtype | None = None) -> Tensor:
    """x * f(v), shaped like x, with f = tanh, 1 + tanh, sigmoid or the identity; B samples, T tokens.

    Arithmetic is in float32 at least; the result has the dtype of x unless `dtype` is another.

    Raises ValueError for another `kind`.
    """
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    v_BTD = v_BTD.to(wide)
    match kind:
        case "tanh":
            factor_BTD = torch.tanh(v_BTD)
        case "one_plus_tanh":
            factor_BTD = 1 + torch.tanh(v_BTD)
        case "sigmoid":
            factor_BTD = torch.sigmoid(v_BTD)
        case "linear":
            factor_BTD = v_BTD
        case _:
            raise ValueError(f"gate {kind!r} is not one of tanh, one_plus_tanh, sigmoid, linear")
    return (x_BTD.to(wide) * factor_BTD).to(dtype or x_BTD.dtype)


def mean_square(gradient_RD: Tensor) -> Tensor:
    """Mean over the columns of the squares of each row [R]."""
    return gradient_RD.square().mean(dim=1)


def rowwise_adagrad_(
    values_RD: Tensor,
    moment_R: Tensor,
    gradient_RD: Tensor,
    lr: float,
    eps: float,
    mean_square_R: Tensor | None = None,
) -> None:
    """One step of row-wise Adagrad, in place: m += mean_d(g^2); v -= lr * g / (sqrt(m) + eps).

    As FBGEMM's EXACT_ROWWISE_ADAGRAD; a row without a gradient stays as it is.  `mean_square_R` is given where
    values_RD holds some columns of the rows only.
    """
    moment_R += mean_square(gradient_RD) if mean_square_R is None else mean_square_R
    values_RD -= lr * gradient_RD / (moment_R.sqrt() + eps)[:, None]


def sgd_(values_RD: Tensor, gradient_RD: Tensor, lr: float) -> None:
    """One step in place: v -= lr * g."""
    values_RD -= lr * gradient_RD


def rowwise_adam_(
    values_RD: Tensor,
    first_RD: Tensor,
    moment_R: Tensor,
    gradient_RD: Tensor,
    lr: float,
    eps: float,
    beta1: float,
    beta2: float,
    step: int,
    mean_square_R: Tensor | None = None,
) -> None:
    """One step, the `step`-th from 1, of Adam with one second moment a row, in place.

    f = beta1 f + (1 - beta1) g; m = beta2 m + (1 - beta2) mean_d(g^2);
    v -= lr * f / (1 - beta1^step) / (sqrt(m / (1 - beta2^step)) + eps), as FBGEMM's PARTIAL_ROWWISE_ADAM.
    A gradient of 0 moves a row too: give only rows that were hit.  `mean_square_R`: see `rowwise_adagrad_`.
    """
    first_RD *= beta1
    first_RD += (1 - beta1) * gradient_RD
    moment_R *= beta2
    moment_R += (1 - beta2) * (mean_square(gradient_RD) if mean_square_R is None else mean_square_R)
    root_R = (moment_R / (1 - beta2**step)).sqrt() + eps
    values_RD -= lr / (1 - beta1**step) * first_RD / root_R[:, None]
