"""A row-sharded weighted lookup made of TorchRec's own parts, with the gradient of the weights that TorchRec drops.

The peer of `msn_dist.sharding`, in tests and benchmarks: KJT input dist, TBE and reduce-scatter are TorchRec's,
unchanged.  They carry the weights to the owners of the rows under no_grad, so only the way back is missing: one
autograd node ties the weights that arrived to those that were sent, its backward is the reverse all-to-all.  For two
ranks or more, on gloo.

Shape suffixes: M bags of this rank, L hits a bag, H hits (sent or received), D value width, R rows on this rank.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torchrec.distributed.comm_ops import torchrec_use_sync_collectives
from torchrec.distributed.dist_data import KJTAllToAllTensorsAwaitable
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionContext,
    EmbeddingBagCollectionSharder,
    ShardedEmbeddingBagCollection,
)
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingSharding, RwSparseFeaturesDist
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import Awaitable, EmbeddingModuleShardingPlan, LazyAwaitable, ShardingEnv
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from msn_dist.sharding import ValueOptimizer

TABLE, FEATURE = "table", "hits"


class TorchRecValues(EmbeddingBagCollection):
    """One table [rows, dim] on the meta device; a type of its own, since sharders are found by exact type."""

    def __init__(self, rows: int, dim: int) -> None:
        table = EmbeddingBagConfig(name=TABLE, num_embeddings=rows, embedding_dim=dim, feature_names=[FEATURE])
        super().__init__([table], is_weighted=True, device=torch.device("meta"))


class TorchRecValuesSharder(EmbeddingBagCollectionSharder):
    """For DistributedModelParallel, together with `plan`."""

    def __init__(self, optimizer: ValueOptimizer) -> None:
        super().__init__(
            fused_params={
                "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
                "learning_rate": optimizer.learning_rate,
                "eps": optimizer.eps,
            }
        )

    def plan(self, module: TorchRecValues, world: int) -> EmbeddingModuleShardingPlan:
        """Blocks of ceil(rows / world) rows, on the ranks of one node with CPUs."""
        return construct_module_sharding_plan(
            module, {TABLE: row_wise(compute_kernel="fused")}, self, world, world, device_type="cpu"
        )

    def shard(
        self,
        module: TorchRecValues,
        params: EmbeddingModuleShardingPlan,
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedTorchRecValues:
        return ShardedTorchRecValues(
            module, params, env, fused_params=self.fused_params, device=device, module_fqn=module_fqn
        )

    @property
    def module_type(self) -> type[TorchRecValues]:
        return TorchRecValues


class ShardedTorchRecValues(ShardedEmbeddingBagCollection):
    """Each rank differentiates its own loss; the weights get that gradient whole, the rows the mean over ranks."""

    @property
    def weight_RD(self) -> Tensor:
        """This rank's rows, sharing memory with the TBE."""
        (sharded,) = self.state_dict().values()
        return sharded.local_tensor()

    def forward(self, rows_ML: Tensor, weights_ML: Tensor) -> Tensor:
        """pooled_MD = sum over l of weights[m, l] * row rows[m, l] of the table; a collective call.

        int64 rows and float32 weights; any number of bags on any rank, none included.
        """
        return super().forward(rows_ML, weights_ML).wait()[FEATURE]

    @classmethod
    def create_embedding_bag_sharding(
        cls, sharding_infos, env, device=None, permute_embeddings=False, qcomm_codecs_registry=None
    ) -> RwPooledEmbeddingSharding:
        return _RowWise(sharding_infos, env, device, qcomm_codecs_registry=qcomm_codecs_registry)

    def input_dist(
        self, ctx: EmbeddingBagCollectionContext, rows_ML: Tensor, weights_ML: Tensor
    ) -> Awaitable[Awaitable[KJTList]]:
        bags, hits = rows_ML.shape
        lengths_M = torch.full((bags,), hits, device=rows_ML.device)
        jagged = KeyedJaggedTensor([FEATURE], rows_ML.flatten(), weights_ML.detach().flatten(), lengths_M)
        awaitable = super().input_dist(ctx, jagged)
        (splits,) = awaitable.awaitables
        splits.callbacks.append(partial(_tie_weights, weights_ML, self._input_dists[0].unbucketize_permute_tensor))
        return awaitable

    def compute_and_output_dist(self, ctx: EmbeddingBagCollectionContext, input: KJTList) -> LazyAwaitable[KeyedTensor]:
        # gloo has no uneven all_gather, the backward of an uneven reduce-scatter
        uneven = len(set(ctx.sharding_contexts[0].batch_size_per_rank)) > 1
        with torchrec_use_sync_collectives() if uneven else nullcontext():
            return super().compute_and_output_dist(ctx, input)


class _RowWise(RwPooledEmbeddingSharding):
    def create_input_dist(self, device: torch.device | None = None) -> RwSparseFeaturesDist:
        input_dist = super().create_input_dist(device)
        input_dist._is_sequence = True  # keep the order in which hits are sent, which pooling does not need
        return input_dist


def _tie_weights(
    weights_ML: Tensor, sent_as_H: Tensor, tensors: KJTAllToAllTensorsAwaitable
) -> KJTAllToAllTensorsAwaitable:
    """Make the weights that `tensors` will deliver depend on weights_ML.  Hit i was sent as number sent_as[i]."""

    def tie(received: KeyedJaggedTensor) -> KeyedJaggedTensor:
        weights_H = _Arrived.apply(
            weights_ML,
            received.weights(),
            sent_as_H,
            tensors._input_splits["weights"],
            tensors._output_splits["weights"],
            tensors._pg,
        )
        return KeyedJaggedTensor(
            received.keys(), received.values(), weights_H, received.lengths(), stride=received.stride()
        )

    # after TorchRec has put what it received into order, which loses gradients too; with one feature it is in order
    tensors.callbacks.append(tie)
    return tensors


class _Arrived(Function):
    """The received weights, as a function of the weights at home."""

    @staticmethod
    def forward(ctx, weights_ML, received_H, sent_as_H, sent_splits, received_splits, group):
        ctx.save_for_backward(sent_as_H)
        ctx.shape, ctx.splits, ctx.group = weights_ML.shape, (sent_splits, received_splits), group
        return received_H.view_as(received_H)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_H):
        (sent_as_H,) = ctx.saved_tensors
        sent_splits, received_splits = ctx.splits
        home_H = gradient_H.new_empty(sum(sent_splits))
        dist.all_to_all_single(home_H, gradient_H.contiguous(), sent_splits, received_splits, group=ctx.group)
        return home_H[sent_as_H].view(ctx.shape), None, None, None, None, None
