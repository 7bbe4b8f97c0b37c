"""Value tables, hits and peers that kernel_gather and kernel_update share.

Shape suffixes: R = n rows of a table, D its width, G bags, L hits of a bag, H hits, U rows that were hit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ZIPF, SEED = 1.05, 5


@dataclass(frozen=True)
class Hits:
    """rows_GL (int64) and weights_GL (float32, of a bag's sum 1)."""

    rows_GL: Tensor
    weights_GL: Tensor

    def offsets_G1(self) -> Tensor:
        bags, hits = self.rows_GL.shape
        return torch.arange(0, bags * hits + 1, hits, device=self.rows_GL.device)


def make_hits(slots: str, n: int, bags: int, hits: int, seed: int, device: str = "cuda") -> Hits:
    """`slots`: uniform; zipf (exponent 1.05, rows renamed so that hot ones lie apart); hot: row 7 is in every bag."""
    generator = torch.Generator(device).manual_seed(seed)
    if slots == "zipf":
        rank_GL = _zipf(n, bags * hits, generator, device).view(bags, hits)
        rows_GL = (rank_GL * _step_without_factor_of(n) + 12345) % n
    else:
        rows_GL = torch.randint(n, (bags, hits), generator=generator, device=device)
    if slots == "hot":
        rows_GL[:, 0] = 7
    weights_GL = torch.randn(bags, hits, generator=generator, device=device).softmax(dim=1)
    return Hits(rows_GL, weights_GL)


def _zipf(n: int, count: int, generator: torch.Generator, device: str) -> Tensor:
    """0-based ranks by inversion; torch.multinomial takes 2^24 categories at most, in float32."""
    rising_R = torch.arange(1, n + 1, dtype=torch.float64, device=device).pow_(-ZIPF).cumsum_(0)
    draws = torch.rand(count, generator=generator, dtype=torch.float64, device=device) * rising_R[-1]
    return torch.searchsorted(rising_R, draws).clamp_(max=n - 1)


def _step_without_factor_of(n: int) -> int:
    step = int(n * 0.618) | 1
    while math.gcd(step, n) != 1:
        step += 2
    return step


def make_table(n: int, dim: int, dtype: torch.dtype, device: str = "cuda") -> Tensor:
    """values_RD, normal."""
    generator = torch.Generator(device).manual_seed(SEED)
    return torch.empty(n, dim, dtype=dtype, device=device).normal_(generator=generator)


@dataclass(frozen=True)
class Tbe:
    """FBGEMM's table-batched embedding of one table, with exact row-wise Adagrad in its backward."""

    read: Callable[[Tensor, Tensor, Tensor], Tensor]  # rows_H, offsets_G1, weights_H -> pooled_GD
    weight_RD: Tensor
    moment_R: Tensor


def make_tbe(values_RD: Tensor, dtype: torch.dtype, out_dtype: torch.dtype, lr: float, eps: float) -> Tbe:
    """A TBE with a copy of the values; no bounds checks and no stochastic rounding, as the others have neither.

    Raises ImportError without FBGEMM.
    """
    from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    on_cpu = values_RD.device.type == "cpu"
    location = EmbeddingLocation.HOST if on_cpu else EmbeddingLocation.DEVICE
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        [(*values_RD.shape, location, ComputeDevice.CPU if on_cpu else ComputeDevice.CUDA)],
        device=values_RD.device,
        weights_precision=SparseType.from_dtype(dtype),
        output_dtype=SparseType.from_dtype(out_dtype),
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=lr,
        eps=eps,
        stochastic_rounding=False,
        bounds_check_mode=BoundsCheckMode.NONE,
    )
    (weight_RD,) = tbe.split_embedding_weights()
    weight_RD.copy_(values_RD)
    ((moment_R,),) = tbe.split_optimizer_states()
    return Tbe(tbe, weight_RD, moment_R)
