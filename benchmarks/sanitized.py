"""compute-sanitizer python -m benchmarks.sanitized: the kernels of a training step, for a tool that watches memory.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck  python -m benchmarks.sanitized
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python -m benchmarks.sanitized

Without torch's cache of blocks, an access past a tensor is one past an allocation.  Sizes are those of
benchmarks.kernels with fewer queries and bags, as the tools slow a kernel down 10 to 100 times.  Rows of 8 bits and the
gather that gates are left out, as no step has them.  Nothing is compared here: the tests do that.
"""

from __future__ import annotations

import sys

import torch

from msn_dist.kernels import bucketing, gate, ops
from msn_dist.kernels.search import Search

# M, N, E, k: the last two with the backward for few sub-keys, the very last in bf16 alone
RETRIEVALS = ((2048, 1024, 64, 32), (1024, 4096, 64, 32), (256, 32768, 64, 32), (513, 100, 48, 17), (2048, 256, 64, 32))
TABLES = ((2**20, 64), (2**20, 128), (2**18, 1024), (1001, 20))  # rows, width
BAGS, HITS = 1025, 32
RANKS = (2, 8, 64)
TOKENS = ((64, 16, 1024), (33, 3, 100))  # B, T, D
NORMS = ((2049, 1, 64), (70_001, 2, 64), (513, 3, 100))  # M, H, E
RULES = ("rowwise_adagrad", "sgd", "rowwise_adam")
NUMBERS = [0.01, 1e-8, 0.9, 0.999]  # lr, eps, beta1, beta2


def main() -> int:
    """The exit code: 2 without a GPU."""
    if not torch.cuda.is_available():
        print("benchmarks.sanitized needs a CUDA GPU, and there is none here", file=sys.stderr)
        return 2
    run_all(torch.device("cuda"))
    torch.cuda.synchronize()
    print(f"the kernels of a step have run on {torch.cuda.get_device_name()}")
    return 0


def run_all(device: torch.device) -> None:
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        for queries, sub_keys, width, k in RETRIEVALS:
            shapes = (2, queries, 1, width), (2, 1, sub_keys, width)
            operands = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
            _, weights_MHK = ops.retrieve(*operands, k, width**-0.5)
            weights_MHK.square().sum().backward()
        for rows, width in TABLES:
            look_up_and_step(rows, width, dtype, device)
        for shape in TOKENS:
            gated(shape, dtype, device)
        for queries, heads, width in NORMS:
            projected_MX = torch.randn(queries, 2 * heads * width, device=device).to(dtype).requires_grad_()
            shapes = (2, heads, 100, width), (2, heads, width, width), *[(2, width)] * 4
            codes, theta, *norms = (torch.randn(shape, device=device, requires_grad=True) for shape in shapes)
            search = Search(8, width**-0.5, 1e-5, mix=False)
            _, weights_MHK = search(projected_MX, codes, theta, norms[:2], norms[2:], dtype)
            weights_MHK.square().sum().backward()
    for ranks in RANKS:
        row_ML = torch.randint(2**20, (BAGS, HITS), device=device)
        bucketing.bucket_hits(row_ML, -(-(2**20) // ranks), ranks)


def gated(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Every gate, both ways; the gradient comes transposed, as from a network with weights for every token."""
    batch, tokens, width = shape
    for kind in gate.KINDS:
        x_BTD = torch.randn(shape, device=device, requires_grad=True)
        v_BTD = torch.randn(shape, device=device).to(dtype).requires_grad_()
        g_TBD = torch.randn(tokens, batch, width, device=device).to(dtype)
        gate.gate(x_BTD, v_BTD, kind, dtype).backward(g_TBD.transpose(0, 1))


def look_up_and_step(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Uniform and jagged bags, scattered hits and one row that all of them have, by every optimizer."""
    values_RD = torch.randn(rows, width, device=device).to(dtype)
    gradient_GD = torch.randn(BAGS, width, device=device).to(dtype)
    weights_GL = torch.rand(BAGS, HITS, device=device)
    offsets_G1 = torch.arange(BAGS + 1, device=device) * HITS
    seed = None if dtype == torch.float32 else 1
    for most in (rows, 1):
        rows_GL = torch.randint(most, (BAGS, HITS), device=device)
        for bags in ((rows_GL, weights_GL, None), (rows_GL.flatten(), weights_GL.flatten(), offsets_G1)):
            ops.sparse_gather(values_RD, *bags, dtype)
            for rule in RULES:
                moment_R = None if rule == "sgd" else torch.zeros(rows, device=device)
                first_RD = torch.zeros(rows, width, device=device) if rule == "rowwise_adam" else None
                ops.sparse_update_(values_RD, moment_R, first_RD, *bags, gradient_GD, rule, NUMBERS, 1, True, seed)


if __name__ == "__main__":
    sys.exit(main())
