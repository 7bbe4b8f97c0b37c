"""Loads torch, FBGEMM and TorchRec; prints what each one offers, or why it does not load, as a line of JSON.

Run by `msn doctor` as a process of its own: libraries that do not match can crash it.
"""

from __future__ import annotations

import json
from typing import Any


def load_torch() -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    return {
        "cuda": torch.version.cuda,
        "gloo": dist.is_gloo_available(),
        "nccl": torch.cuda.nccl.version() if cuda and dist.is_nccl_available() else None,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else [],
    }


def load_fbgemm() -> dict[str, Any]:
    import torch
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    # An operator is looked up only when it is used, so an import alone proves nothing.
    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(4, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)], optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD
    )
    table(torch.tensor([0, 3]), torch.tensor([0, 2])).sum().backward()
    return {}


def load_torchrec() -> dict[str, Any]:
    import torchrec.distributed  # noqa: F401

    return {}


for name, load in {"torch": load_torch, "fbgemm": load_fbgemm, "torchrec": load_torchrec}.items():
    try:
        found = load()
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    print("\n" + json.dumps({name: found}), flush=True)
