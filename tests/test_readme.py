"""The README's own example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from ranks import run_ranks

README = Path(__file__).parents[1] / "README.md"


def example(rank: int, world: int) -> tuple[int, bool]:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    features = [f"id{i}" for i in range(4)]
    tables = [
        EmbeddingBagConfig(name=name, embedding_dim=16, num_embeddings=100, feature_names=[name]) for name in features
    ]
    model = names["MyModel"](EmbeddingBagCollection(tables, device="meta"))
    model = names["shard"](model, world, world, torch.device("cpu"))
    rows = 3 + rank
    kjt = KeyedJaggedTensor(keys=features, values=torch.arange(4 * rows), lengths=torch.ones(4 * rows).long())
    model(kjt).sum().backward()
    queries = model.module.memory.keys.query_XD.grad
    return model.module.memory.values.health().hits, bool(queries.any())


def test_the_memory_plugs_into_a_torchrec_model_as_the_readme_says() -> None:
    hits = (3 + 4) * 4 * 32
    assert run_ranks(example, 2) == [(hits, True)] * 2
