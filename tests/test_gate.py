"""The fused gate against the plain formula in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from msn_dist.config import MemoryConfig
from msn_dist.kernels import gate as kernel_gate
from msn_dist.kernels import reference
from msn_dist.kernels.gate import KINDS, TYPES, gate
from msn_dist.memory import Memory
from msn_dist.memory import gate as memory_gate
from msn_dist.memory.gate import Gate
from msn_dist.planner.gpu_rules import fused_gate
from msn_dist.planner.live_bytes import LiveBytes
from triton_device import DEVICE

ERROR = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SHAPES = [(3, 2, 8), (1, 1, 1), (5, 3, 1), (2, 7, 33), (3, 5, 1000), (2, 1, 1025), (1, 3, 2050), (700, 3, 2)]
ODD = (math.inf, -math.inf, math.nan)


def operands(shape: tuple[int, ...], x_dtype: torch.dtype, v_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, v and the gradient of the result."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, v, g = (torch.randn(shape, generator=generator).to(DEVICE) for _ in range(3))
    return x.to(x_dtype).requires_grad_(), (2 * v).to(v_dtype).requires_grad_(), g.to(x_dtype)


def passes(x: Tensor, v: Tensor, g: Tensor, kind: str) -> list[Tensor]:
    """The result and the gradients of x and v."""
    out = gate(x, v, kind)
    return [out.detach(), *torch.autograd.grad(out, (x, v), g)]


def assert_exact(
    found: list[Tensor], x: Tensor, v: Tensor, g: Tensor, kind: str, *, gradients_only: bool = False
) -> None:
    exact_x, exact_v = (operand.detach().double().requires_grad_() for operand in (x, v))
    out = reference.gate(exact_x, exact_v, kind)
    expected = [out.detach(), *torch.autograd.grad(out, (exact_x, exact_v), g.double())]
    dtypes = x.dtype, x.dtype, v.dtype
    for one, other, dtype in [*zip(found, expected, dtypes, strict=True)][gradients_only:]:
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=ERROR[dtype], atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_plain_formula_rounds_once(kind: str, dtype: torch.dtype) -> None:
    x, v, _ = operands((20, 7, 33), dtype, dtype)
    assert torch.equal(reference.gate(x, v, kind), reference.gate(x.float(), v.float(), kind).to(dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("x_dtype", "v_dtype"), [*product(TYPES, TYPES)])
def test_every_kind_and_pair_of_dtypes_equals_the_formula(
    kind: str, x_dtype: torch.dtype, v_dtype: torch.dtype
) -> None:
    x, v, g = operands((3, 5, 33), x_dtype, v_dtype)
    found = passes(x, v, g, kind)
    assert_exact(found, x, v, g, kind)
    assert all(torch.equal(one, other) for one, other in zip(found, passes(x, v, g, kind), strict=True)), "repeats"


@pytest.mark.parametrize(("x_dtype", "out_dtype"), [*product(TYPES, TYPES)])
def test_the_result_is_rounded_once_to_any_dtype(x_dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    x, v, g = operands((3, 5, 33), x_dtype, torch.bfloat16)
    out = gate(x, v, "tanh", out_dtype)
    exact = reference.gate(x.detach().double(), v.detach().double(), "tanh")
    assert out.dtype == reference.gate(x, v, "tanh", out_dtype).dtype == out_dtype
    torch.testing.assert_close(out.double(), exact, rtol=ERROR[out_dtype], atol=2e-6)
    found = torch.autograd.grad(out, (x, v), g.to(out_dtype))
    assert_exact([x.detach(), *found], x, v, g.to(out_dtype), "tanh", gradients_only=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_size_equals_the_formula(shape: tuple[int, ...]) -> None:
    x, v, g = operands(shape, torch.float32, torch.bfloat16)
    assert_exact(passes(x, v, g, "tanh"), x, v, g, "tanh")


@pytest.mark.parametrize("shape", [(0, 3, 8), (3, 0, 8), (3, 2, 0)])
def test_nothing_is_gated_to_nothing(shape: tuple[int, ...]) -> None:
    x, v, g = operands(shape, torch.float32, torch.float32)
    assert [result.shape for result in passes(x, v, g, "tanh")] == [shape] * 3


@pytest.mark.parametrize("width", [1, 8, 12])
def test_operands_of_any_strides_equal_the_formula(width: int) -> None:
    x, v, g = operands((4, 3, width), torch.float32, torch.float32)
    turned = [operand.detach().transpose(0, 1).contiguous().transpose(0, 1) for operand in (x, v, g)]
    stepped = [operand.detach().repeat_interleave(2, 2)[:, :, ::2] for operand in (x, v, g)]
    shared_g = g[:1, :1, :1].expand(g.shape)
    for x, v, g in (turned, stepped, (*turned[:2], shared_g), (*stepped[:2], turned[2])):
        x.requires_grad_()
        v.requires_grad_()
        assert_exact(passes(x, v, g, "sigmoid"), x, v, g, "sigmoid")


@pytest.mark.parametrize("kind", KINDS)
def test_small_large_and_odd_numbers_come_out_as_in_the_formula(kind: str) -> None:
    numbers = torch.tensor([0.0, 1e-30, -1e-6, 1e-3, 0.2499, -0.25, 0.3, -1.5, 20.0, -200.0, *ODD], device=DEVICE)
    x, v = (half[None] for half in torch.meshgrid(numbers, numbers, indexing="ij"))
    found = gate(x.contiguous(), v.contiguous(), kind)
    expected = reference.gate(x, v, kind)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_stay_where_they_are_and_reach_the_gradients(kind: str) -> None:
    for where, odd in product(range(3), ODD):
        x, v, g = operands((2, 3, 5), torch.float32, torch.float32)
        (x, v, g)[where].data[1, 2, 3] = odd
        found = passes(x, v, g, kind)
        assert_exact(found, x, v, g, kind)
        for result in found:
            result[1, 2, 3] = 0
            assert result.isfinite().all()


def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **of: empty_like(tensor, **of).fill_(math.nan))
    assert all(result.isfinite().all() for result in passes(*operands((3, 5, 33), *TYPES[:2]), "tanh"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(kind="concat"), "gate 'concat' is not one of tanh"),
        (dict(v=torch.zeros(3, 2, 4)), r"v is \[3, 2, 4\] on cpu and x \[2, 3, 4\] on cpu: give both"),
        (dict(x=torch.zeros(6, 4), v=torch.zeros(6, 4)), r"give both as \[B, T, D\]"),
        (dict(x=torch.zeros(2, 3, 4).double()), "x is torch.float64"),
        (dict(v=torch.zeros(2, 3, 4).int()), "v is torch.int32"),
        (dict(dtype=torch.float64), "dtype is torch.float64: give one of torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_fix(change: dict[str, object], says: str) -> None:
    given = dict(x=torch.zeros(2, 3, 4), v=torch.zeros(2, 3, 4), kind="tanh", dtype=None) | change
    with pytest.raises(ValueError, match=says):
        gate(*given.values())


@pytest.mark.parametrize("value_dim", [16, 8])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, "concat"])
def test_a_memory_gated_by_the_kernel_learns_as_one_gated_by_the_formula(
    kind: str, autocast: bool, value_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for chosen in (reference.gate, gate):
        monkeypatch.setattr(Gate, "product", lambda self, x_BTD, chosen=chosen: chosen)
        torch.manual_seed(0)
        config = MemoryConfig(sub_keys=9, top_k=4, key_dim=16, gate=kind, value_dim=value_dim, value_init_std=1.0)
        memory = Memory(config, tokens=2, width=16, seed=0, device=DEVICE).to(DEVICE)
        x_BTD = torch.randn(6, 2, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            out_BTD = memory(x_BTD)
        out_BTD.square().sum().backward()
        results.append([out_BTD, x_BTD.grad, *(parameter.grad for parameter in memory.parameters())])
    error = 0.05 if autocast else 1e-5  # the interpreter cuts bf16 off, where torch rounds
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).abs().max() <= error * max(1, other.abs().max())


@pytest.mark.parametrize(
    ("on_gpu", "dtype", "no_triton", "fused"),
    [
        (True, torch.float32, None, True),
        (True, torch.bfloat16, None, True),
        (True, torch.float32, "it is old", False),
        (True, torch.float64, None, False),
        (False, torch.float32, None, False),
    ],
)
def test_the_kernel_gates_on_a_gpu_and_torch_elsewhere(
    on_gpu: bool, dtype: torch.dtype, no_triton: str | None, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_gate, "why_no_triton", lambda _: no_triton)
    monkeypatch.setattr(memory_gate, "interpreted", lambda: False)
    x_BTD = SimpleNamespace(is_cuda=on_gpu, dtype=dtype, device=None)
    assert Gate("tanh", 4, 4).product(x_BTD) is (gate if fused else reference.gate)


def test_the_planner_counts_the_bytes_that_the_kernel_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_gate, "_launch", lambda *_, **__: None)  # the interpreter has tensors of its own

    def held(function: Callable, dtype: torch.dtype | None) -> list[tuple[int, int]]:
        x, v, g = operands((64, 4, 32), torch.float32, torch.bfloat16)
        with LiveBytes(on_gpu=True) as bytes_:
            out = function(x * 1, v * 1, "tanh", dtype)
            after_forward = bytes_.live, bytes_.peak
            out.backward(g.to(out.dtype))
        return [after_forward, (bytes_.live, bytes_.peak)]

    for dtype in (None, torch.bfloat16):
        assert held(gate, dtype) == held(partial(fused_gate, lambda *_: None), dtype)


@pytest.mark.gpu
def test_tokens_beyond_two_to_the_31_elements() -> None:
    x, v = (torch.ones(2**21 + 1, 1, 1024, dtype=torch.bfloat16, device=DEVICE, requires_grad=True) for _ in range(2))
    out = gate(x, v, "linear")
    out.backward(out.detach())
    for result in (out, x.grad, v.grad):
        assert bool((result[-2:] == 1).all()) and bool((result[:2] == 1).all())
