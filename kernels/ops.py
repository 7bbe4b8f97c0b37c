"""The Triton kernels as operators of torch (`torch.ops.msn_dist`), which torch.compile takes as they are.

`retrieve` is differentiable.  The gather has no gradient of its own, and the update works in place: a table's gradient
never exists, so the two halves are called by the look-up's own autograd function.

Each has a function of its name that is for callers: under torch.compile it is the operator, else what the operator
runs, since an operator costs the host, which a GPU often waits for, several times as much.

Shape suffixes: A = 2 axes, M queries, H heads, N sub-keys of an axis, E key width of one half, K hits of a head; R rows
of a value table, D its width, G bags, and H hits in the sparse operators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from msn_dist.kernels import retrieval
from msn_dist.kernels import sparse_gather as gather
from msn_dist.kernels import sparse_update as update


def _for_callers(operator: Callable, plain: Callable) -> Callable:
    """`operator` under torch.compile, else `plain`, which is the same."""

    @functools.wraps(plain)
    def call(*arguments, **options):
        return (operator if torch.compiler.is_compiling() else plain)(*arguments, **options)

    return call


@torch.library.custom_op("msn_dist::retrieve", mutates_args=())
def retrieve_op(queries_AMHE: Tensor, keys_AHNE: Tensor, k: int, tau: float) -> tuple[Tensor, Tensor]:
    """`retrieve` as an operator."""
    return retrieval.retrieve(queries_AMHE, keys_AHNE, k, tau)


@retrieve_op.register_fake
def _(queries_AMHE, keys_AHNE, k, tau):
    weights_MHK = queries_AMHE.new_empty((*queries_AMHE.shape[1:3], k), dtype=torch.float32)
    return torch.empty_like(weights_MHK, dtype=torch.int64), weights_MHK


@torch.library.custom_op("msn_dist::retrieve_backward", mutates_args=())
def retrieve_backward_op(
    queries_AMHE: Tensor,
    keys_AHNE: Tensor,
    slots_MHK: Tensor,
    weights_MHK: Tensor,
    gradient_MHK: Tensor,
    tau: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of queries_AMHE, in their dtype, and of keys_AHNE in float32."""
    return retrieval.retrieve_backward(queries_AMHE, keys_AHNE, slots_MHK, weights_MHK, gradient_MHK, tau)


@retrieve_backward_op.register_fake
def _(queries_AMHE, keys_AHNE, slots_MHK, weights_MHK, gradient_MHK, tau):
    return queries_AMHE.new_empty(queries_AMHE.shape), keys_AHNE.new_empty(keys_AHNE.shape, dtype=torch.float32)


def _keep(ctx, inputs, output) -> None:
    *operands, _, ctx.tau = inputs
    ctx.set_materialize_grads(False)  # else zeros are made for the slots, which have no gradient
    ctx.save_for_backward(*operands, *output)


def _gradients(backward, ctx, gradient_MHK) -> tuple[Tensor | None, ...]:
    if gradient_MHK is None:
        return (None,) * 4
    queries_AMHE, keys_AHNE, *found = ctx.saved_tensors
    of_queries_AMHE, of_keys_AHNE = backward(queries_AMHE, keys_AHNE, *found, gradient_MHK, ctx.tau)
    return of_queries_AMHE, of_keys_AHNE.to(keys_AHNE.dtype), None, None


retrieve_op.register_autograd(
    lambda ctx, _, gradient_MHK: _gradients(retrieve_backward_op, ctx, gradient_MHK), setup_context=_keep
)


class _Retrieve(Function):
    """`retrieve_op` with its gradients."""

    @staticmethod
    def forward(ctx, *inputs):
        output = retrieval.retrieve(*inputs)
        _keep(ctx, inputs, output)
        ctx.mark_non_differentiable(output[0])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, _, gradient_MHK):
        return _gradients(retrieval.retrieve_backward, ctx, gradient_MHK)


def _retrieve(queries_AMHE: Tensor, keys_AHNE: Tensor, k: int, tau: float) -> tuple[Tensor, Tensor]:
    """slots_MHK (int64) and weights_MHK (float32), as `kernels.retrieval.retrieve`; differentiable to both operands."""
    return _Retrieve.apply(queries_AMHE, keys_AHNE, k, tau)


retrieve = _for_callers(retrieve_op, _retrieve)


def _sparse_gather(
    values_RD: Tensor,
    rows: Tensor,
    weights: Tensor | None,
    offsets_G1: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """pooled_GD in `dtype`, as `kernels.sparse_gather.sparse_gather`."""
    return gather.sparse_gather(values_RD, rows, weights, offsets_G1, out_dtype=dtype)


sparse_gather_op = torch.library.custom_op("msn_dist::sparse_gather", _sparse_gather, mutates_args=())
sparse_gather = _for_callers(sparse_gather_op, _sparse_gather)


@sparse_gather_op.register_fake
def _(values_RD, rows, weights, offsets_G1, dtype=torch.float32):
    bags = len(rows) if offsets_G1 is None else len(offsets_G1) - 1
    return values_RD.new_empty((bags, values_RD.shape[1]), dtype=dtype)


def _sparse_update_(
    values_RD: Tensor,
    moment_R: Tensor | None,
    first_RD: Tensor | None,
    rows: Tensor,
    weights: Tensor | None,
    offsets_G1: Tensor | None,
    gradient_GD: Tensor,
    rule: str,
    numbers: list[float],
    step: int,
    of_weights: bool,
    rounding_seed: int | None = None,
) -> Tensor:
    """One optimizer step by `kernels.sparse_update.sparse_update`, in place.

    `rule` is "sgd", "rowwise_adagrad" or "rowwise_adam", `numbers` are lr, eps, beta1 and beta2, of which a rule takes
    its own, and `step` counts from 1 for rowwise_adam; moment_R and first_RD as in `RowState`.  Returns the gradient of
    the weights before the step, float32 and shaped as the rows; [0] without `of_weights`.
    """
    gradient = update.sparse_update(
        values_RD,
        update.RowState(moment_R, first_RD),
        rows,
        weights,
        offsets_G1,
        gradient_GD,
        _rule(rule, step, *numbers),
        of_weights=of_weights,
        rounding_seed=rounding_seed,
    )
    return gradient if of_weights else gradient_GD.new_empty(0, dtype=torch.float32)


sparse_update_op = torch.library.custom_op(
    "msn_dist::sparse_update_", _sparse_update_, mutates_args=("values_RD", "moment_R", "first_RD")
)
sparse_update_ = _for_callers(sparse_update_op, _sparse_update_)


@sparse_update_op.register_fake
def _(
    values_RD, moment_R, first_RD, rows, weights, offsets_G1, gradient_GD, rule, numbers, step, of_weights,
    rounding_seed=None,
):  # fmt: skip
    return rows.new_empty(rows.shape if of_weights else 0, dtype=torch.float32)


def _rule(name: str, step: int, lr: float, eps: float, beta1: float, beta2: float) -> update.Rule:
    match name:
        case "sgd":
            return update.Sgd(lr)
        case "rowwise_adagrad":
            return update.RowwiseAdagrad(lr, eps)
        case "rowwise_adam":
            return update.RowwiseAdam(lr, step, eps, beta1, beta2)
    raise ValueError(f"rule is {name!r}: give sgd, rowwise_adagrad or rowwise_adam")
