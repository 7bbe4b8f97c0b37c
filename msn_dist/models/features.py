"""From ids, histories and dense numbers to one vector per row.

Shape suffixes: B rows, K sparse keys, E embedding width, N events of all rows one after the other, C width of all
columns of a history, F features side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from msn_dist.data.batch import Batch
from msn_dist.data.schema import Schema
from msn_dist.errors import InputError
from msn_dist.models.attention import TargetAttention, sum_of_lists


class Features(nn.Module):
    """Concatenated embeddings and dense numbers: Batch -> [B, width] float32.

    Every sparse key (an id or a column of a history) is the mean of its embeddings, 0 for an empty list; keys that
    name one table share it.  With `attention`, each history adds what the target attends to in it.

    Tables live in `id_tables` (EmbeddingBagCollection).  With `attention`, the tables that histories read live in
    `sequence_tables` (EmbeddingCollection) instead, and both the mean and the attention are computed from its rows.
    Either is None when it would hold no table.  Both may be sharded; their initial values are the trainer's business.
    A batch without rows needs `id_tables` sharded: TorchRec's plain collection does not take one.

    Dense numbers pass as sign(x) * log(1 + |x|): counts and rates get one scale without statistics of the batch.

    Raises InputError if attention is asked for and the schema has no history.
    """

    def __init__(self, schema: Schema, embedding_dim: int, attention: bool, *, device: torch.device | str = "cpu"):
        super().__init__()
        if attention and not schema.histories:
            raise InputError(f"model.attention is true, but schema {schema.name!r} has no histories; set it to false")
        attended = schema.histories if attention else {}
        self.histories = {name: dict(history.columns) for name, history in attended.items()}
        sequence_tables = {schema.table_of(column) for columns in self.histories.values() for column in columns}
        self.pooled_keys = [key for key in schema.sparse_keys if schema.table_of(key) not in sequence_tables]
        self.sequence_keys = [key for key in schema.sparse_keys if schema.table_of(key) in sequence_tables]
        self.place = {key: place for place, key in enumerate(self.pooled_keys + self.sequence_keys)}
        order_K = torch.tensor([schema.sparse_keys.index(key) for key in self.place])
        self.register_buffer("order_K", order_K, persistent=False)
        attended_widths = {name: embedding_dim * len(columns) for name, columns in self.histories.items()}
        self.width = embedding_dim * len(self.place) + sum(attended_widths.values()) + len(schema.dense)

        self.attention = nn.ModuleDict({name: TargetAttention(width) for name, width in attended_widths.items()})
        with torch.random.fork_rng(devices=[]):  # tables on meta draw nothing, and dense weights must not notice
            # The mean is taken here: TorchRec's own over row-wise sharded tables fails on a rank without rows.
            bags = [
                EmbeddingBagConfig(**table, pooling=PoolingType.SUM)
                for table in _tables(schema, self.pooled_keys, embedding_dim)
            ]
            rows = [EmbeddingConfig(**table) for table in _tables(schema, self.sequence_keys, embedding_dim)]
            self.id_tables = EmbeddingBagCollection(bags, device=torch.device(device)) if bags else None
            self.sequence_tables = EmbeddingCollection(rows, device=torch.device(device)) if rows else None

    def forward(self, batch: Batch) -> Tensor:
        rows, pooled = batch.dense_BF.shape[0], len(self.pooled_keys)
        lengths_KB = batch.sparse.lengths().view(len(self.place), rows)
        # Both exchanges start before either is waited for.
        bags = self.id_tables(batch.sparse) if self.id_tables is not None else None
        events = self.sequence_tables(one_row(batch.sparse, lengths_KB)) if self.sequence_tables is not None else None

        lengths_KB = lengths_KB.index_select(0, self.order_K)
        sums = []
        if bags is not None:
            sums.append(in_order(bags, self.pooled_keys).unflatten(1, (pooled, -1)))
        if events is not None:
            values_NE = torch.cat([events[key].values() for key in self.sequence_keys])
            sums_BE = sum_of_lists(values_NE, lengths_KB[pooled:].flatten())
            sums.append(sums_BE.unflatten(0, (len(self.sequence_keys), rows)).transpose(0, 1))
        means_BKE = torch.cat(sums, 1) / lengths_KB.T.clamp(min=1).unsqueeze(-1)

        parts = [means_BKE.flatten(1)]
        for name, columns in self.histories.items():
            target_BC = torch.cat([means_BKE[:, self.place[feature]] for feature in columns.values()], 1)
            events_NC = torch.cat([events[column].values() for column in columns], 1)
            lengths_B = lengths_KB[self.place[next(iter(columns))]]
            parts.append(self.attention[name](target_BC, events_NC, lengths_B))
        parts.append(batch.dense_BF.sign() * batch.dense_BF.abs().log1p())
        return torch.cat(parts, 1)


@torch.fx.wrap
def in_order(bags: KeyedTensor, keys: list[str]) -> Tensor:
    """[B, K*E] in the order of `keys`; sharded tables come back in an order that depends on the plan."""
    if bags.keys() == keys:
        return bags.values()
    parts = dict(zip(bags.keys(), bags.values().split(bags.length_per_key(), 1), strict=True))
    return torch.cat([parts[key] for key in keys], 1)


@torch.fx.wrap
def one_row(sparse: KeyedJaggedTensor, lengths_KB: Tensor) -> KeyedJaggedTensor:
    """All rows' lists of a key as one list: single embeddings do not care, and TorchRec needs a row on each rank."""
    return KeyedJaggedTensor(keys=sparse.keys(), values=sparse.values(), lengths=lengths_KB.sum(1), stride=1)


def _tables(schema: Schema, keys: list[str], embedding_dim: int) -> list[dict]:
    """Arguments of the tables that `keys` read, in the order of the schema."""
    keys_of = {table: [key for key in keys if schema.table_of(key) == table] for table in schema.tables}
    return [
        {"name": table, "embedding_dim": embedding_dim, "num_embeddings": schema.tables[table], "feature_names": names}
        for table, names in keys_of.items()
        if names
    ]
