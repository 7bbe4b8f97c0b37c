"""Features over sharded tables equal the plain ones: values and updated rows, with uneven and empty batches."""

from __future__ import annotations

import gc

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from test_models import LISTS, SCHEMA, toy_batch
from torch import Tensor, nn
from torchrec.distributed.comm_ops import set_use_sync_collectives
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from msn_dist.data.batch import Batch
from msn_dist.models.features import Features
from ranks import run_ranks

FUSED = {"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 1.0}
SHARDERS = {
    "id_tables": EmbeddingBagCollectionSharder(fused_params=FUSED),
    "sequence_tables": EmbeddingCollectionSharder(fused_params=FUSED),
}
EMPTY, UNEVEN = [[0, 1, 2], []], [[1], [0, 2]]  # rows of each rank
CASES = [
    (False, "row_wise", EMPTY),
    (False, "table_wise", UNEVEN),
    (True, "row_wise", UNEVEN),
    (True, "table_wise", EMPTY),
]


def rows_of_batch(rows: list[int]) -> Batch:
    whole = toy_batch()
    lists = [LISTS[key][row] for key in SCHEMA.sparse_keys for row in rows]
    sparse = KeyedJaggedTensor(
        keys=SCHEMA.sparse_keys,
        values=torch.tensor([value for one in lists for value in one], dtype=torch.int64),
        lengths=torch.tensor([len(one) for one in lists], dtype=torch.int64),
        stride=len(rows),
    )
    return Batch(sparse, whole.dense_BF[rows], whole.labels_BK[rows], whole.groups_B[rows])


def filled(attention: bool) -> Features:
    torch.manual_seed(0)
    features = Features(SCHEMA, 4, attention)
    for parameter in features.parameters():
        nn.init.normal_(parameter)
    return features


def gradient_of(out_BF: Tensor) -> Tensor:
    return torch.linspace(-1, 1, out_BF.shape[1]).expand_as(out_BF)


def shard(features: Features, scheme: str, world_size: int) -> DistributedModelParallel:
    """Shard every table; its rows keep their values."""
    values = {name: value.clone() for name, value in features.state_dict().items()}
    plan = {}
    for path, sharder in SHARDERS.items():
        module = getattr(features, path)
        if module is None:
            continue
        tables = sharder.shardable_parameters(module)
        choice = {
            table: row_wise(compute_kernel="fused")
            if scheme == "row_wise"
            else table_wise(rank=i % world_size, compute_kernel="fused")
            for i, table in enumerate(tables)
        }
        plan[path] = construct_module_sharding_plan(module, choice, sharder, world_size, world_size, "cpu")
    sharded = DistributedModelParallel(
        features, device=torch.device("cpu"), plan=ShardingPlan(plan), sharders=list(SHARDERS.values())
    )
    for name, rows in local_tables(sharded):
        rows.tensor.copy_(values[name][rows.metadata.shard_offsets[0] :][: len(rows.tensor)])
    return sharded


def local_tables(sharded: DistributedModelParallel) -> list[tuple]:
    tables = [(name, value) for name, value in sharded.state_dict().items() if hasattr(value, "local_shards")]
    return [(name, rows) for name, value in tables for rows in value.local_shards()]


def sharded_cases(rank: int, world_size: int) -> list[str]:
    """Every case on this rank; returns what is wrong."""
    set_use_sync_collectives(True)  # as batches of different sizes need on gloo
    wrong = []
    for case in CASES:
        attention, scheme, rows_of_rank = case
        mine = rows_of_rank[rank]
        plain = filled(attention)
        expected_BF = plain(toy_batch())
        (expected_BF * gradient_of(expected_BF)).sum().backward()
        after = {name: (value - value.grad).detach() for name, value in plain.named_parameters()}

        sharded = shard(filled(attention), scheme, world_size)
        out_BF = sharded(rows_of_batch(mine))
        # TorchRec and DDP average over ranks
        (world_size * out_BF * gradient_of(out_BF)).sum().backward()
        if not torch.allclose(out_BF, expected_BF[mine], atol=1e-6):
            wrong.append(f"{case}: values")
        for name, rows in local_tables(sharded):
            expected = after[name][rows.metadata.shard_offsets[0] :][: len(rows.tensor)]
            if not torch.allclose(rows.tensor, expected, atol=1e-5):
                wrong.append(f"{case}: updated {name}")
        for name, value in sharded.module.attention.named_parameters():
            expected = plain.attention.get_parameter(name).grad
            if not torch.allclose(value.grad, expected, atol=1e-4, rtol=1e-4):
                wrong.append(f"{case}: gradient of attention.{name}")
        del sharded, out_BF
        gc.collect()
    return wrong


def test_sharded_features_equal_plain_ones_with_uneven_and_empty_batches():
    assert run_ranks(sharded_cases, 2) == [[], []]
