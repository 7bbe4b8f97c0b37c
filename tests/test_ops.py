"""The kernels as operators of torch: their schemas, fakes and gradients, and what torch.compile makes of them."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from msn_dist.config import MemoryConfig, RankMixerConfig
from msn_dist.errors import InputError
from msn_dist.kernels import ops, reference
from msn_dist.memory import Memory, product_keys
from msn_dist.models.rankmixer import RankMixer
from triton_device import DEVICE

ROOT = Path(__file__).parent.parent
COMPILED = {"backend": "aot_eager", "fullgraph": True}


def operands(queries: int = 5, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries and keys of two axes and two heads, 9 sub-keys and width 16, that require gradients."""
    generator = torch.Generator().manual_seed(queries)
    shapes = (2, queries, 2, 16), (2, 2, 9, 16)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("queries", [5, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_retrieve_is_a_sound_operator(queries: int, dtype: torch.dtype) -> None:
    # not its check of compiled gradients, which adds up all outputs, and slots are integers; that is done below
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    inputs = operands(queries, dtype)
    torch.library.opcheck(ops.retrieve_op, (*inputs, 4, 0.25), test_utils=checks)
    inputs = [operand.detach() for operand in inputs]
    slots_MHK, weights_MHK = ops.retrieve(*inputs, 4, 0.25)
    inputs[0] = inputs[0].transpose(0, 1).contiguous().transpose(0, 1)  # as a layer's are, whose axes lie side by side
    torch.library.opcheck(ops.retrieve_backward_op, (*inputs, slots_MHK, weights_MHK, weights_MHK, 0.25))


def test_the_gather_and_the_update_are_sound_operators() -> None:
    values_RD, moment_R = torch.randn(20, 8, device=DEVICE), torch.rand(20, device=DEVICE)
    rows_GL = torch.randint(20, (6, 4), device=DEVICE)
    weights_GL, gradient_GD = torch.rand(6, 4, device=DEVICE), torch.randn(6, 8, device=DEVICE)
    offsets_G1 = torch.tensor([0, 3, 3, 24], device=DEVICE)
    uniform, jagged = (rows_GL, weights_GL, None), (rows_GL.flatten(), weights_GL.flatten(), offsets_G1)
    for bags in (uniform, jagged, (rows_GL.flatten(), None, offsets_G1)):
        torch.library.opcheck(ops.sparse_gather_op, (values_RD, *bags))
    numbers, first_RD = [0.1, 1e-8, 0.9, 0.999], torch.zeros_like(values_RD)
    for bags, rule, state, of_weights in (
        (uniform, "rowwise_adagrad", (moment_R, None), True),
        (jagged, "rowwise_adam", (moment_R, first_RD), False),
        (uniform, "sgd", (None, None), False),
    ):
        gradient = gradient_GD[: 6 if bags is uniform else 3]
        step = (values_RD, *state, *bags, gradient, rule, numbers, 3, of_weights)
        torch.library.opcheck(ops.sparse_update_op, step)
        halves = (values_RD.bfloat16(), *step[1:], 5)
        torch.library.opcheck(ops.sparse_update_op, halves)
    with pytest.raises(ValueError, match="rule is 'adam': give sgd, rowwise_adagrad or rowwise_adam"):
        ops.sparse_update_(values_RD, None, None, *uniform, gradient_GD, "adam", numbers, 1, False)


@pytest.mark.parametrize("retrieve", [ops.retrieve, ops.retrieve_op], ids=["function", "operator"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_back_ends_retrieve_the_same_with_the_same_gradients(dtype: torch.dtype, retrieve: Callable) -> None:
    found, expected = operands(dtype=dtype), operands(dtype=dtype)
    slots_MHK, weights_MHK = retrieve(*found, 4, 0.25)
    expected_slots_MHK, expected_weights_MHK = reference.retrieve(*expected, 4, 0.25)
    assert torch.equal(slots_MHK, expected_slots_MHK)
    torch.testing.assert_close(weights_MHK, expected_weights_MHK, rtol=1e-4, atol=1e-5)
    gradient_MHK = torch.randn_like(weights_MHK)
    weights_MHK.backward(gradient_MHK)
    expected_weights_MHK.backward(gradient_MHK)
    # both are rounded once, to the dtype of the operand
    error = 1e-4 if dtype == torch.float32 else 2e-2
    for one, other in zip(found, expected, strict=True):
        assert one.grad.dtype == dtype
        torch.testing.assert_close(one.grad, other.grad, rtol=error, atol=error / 10)


def test_the_operators_compile_without_a_graph_break() -> None:
    def pooled(*inputs: Tensor) -> Tensor:
        queries_AMHE, keys_AHNE, values_RD, moment_R = inputs
        slots_MHK, weights_MHK = ops.retrieve(queries_AMHE, keys_AHNE, 4, 0.25)
        bags = slots_MHK.flatten(1), weights_MHK.detach().flatten(1), None
        pooled_GD = ops.sparse_gather(values_RD, *bags)
        numbers = [0.1, 1e-8, 0.9, 0.999]
        ops.sparse_update_(values_RD, moment_R, None, *bags, pooled_GD, "rowwise_adagrad", numbers, 0, False)
        return pooled_GD.sum() + (weights_MHK * weights_MHK).sum()

    values_RD = torch.randn(81, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    results = []
    for function in (pooled, torch.compile(pooled, **COMPILED)):
        inputs = [*operands(), values_RD.clone(), torch.zeros(81, device=DEVICE)]
        function(*inputs).backward()
        results.append([*inputs[2:], *(operand.grad for operand in inputs[:2])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.equal(results[1][0], values_RD), "rows are stepped"


@pytest.mark.parametrize("retrieval", ["triton", "reference", "auto"])
@pytest.mark.parametrize("autocast", [True, False])
def test_a_ranker_with_a_memory_compiles_as_one_graph_and_gives_the_same(retrieval: str, autocast: bool) -> None:
    torch.manual_seed(0)
    memory = MemoryConfig(sub_keys=9, top_k=4, heads=2, key_dim=16, retrieval=retrieval, share="token")
    plain = RankMixer(RankMixerConfig(tokens=2, width=16), 10, memory, seed=0).to(DEVICE)
    compiled = copy.deepcopy(plain)
    features_BF = torch.randn(4, 10).to(DEVICE)
    results = []
    for model, forward in ((plain, plain), (compiled, torch.compile(compiled.eval(), **COMPILED))):
        model.eval()  # counting of hits moves tables between devices, which is no part of the graph
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            hidden_BD, _ = forward(features_BF)
        hidden_BD.square().sum().backward()
        results.append([hidden_BD, *(parameter.grad for parameter in model.parameters())])
    # gradients of 16 bits are added up in another order
    error = {"rtol": 0.05, "atol": 0.05} if autocast else {}
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **error)


def test_the_whole_step_compiles_in_training() -> None:
    torch.manual_seed(0)
    memory = MemoryConfig(sub_keys=9, top_k=4, key_dim=16, retrieval="triton")
    model = RankMixer(RankMixerConfig(tokens=2, width=16), 10, memory, seed=0).to(DEVICE)
    features_BF = torch.randn(4, 10).to(DEVICE)
    expected_BD, _ = model(features_BF)
    found_BD, _ = torch.compile(model, **COMPILED)(features_BF)
    torch.testing.assert_close(found_BD, expected_BD)
    hits = [layer.values.health().hits for layer in model.memories().values()]
    assert hits == [2 * 4 * 2 * 4] * len(hits), "hits are counted, once a forward"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_both_back_ends_are_given_the_same_16_bit_operands(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    outputs = []
    for retrieval in ("triton", "reference"):
        torch.manual_seed(0)
        config = MemoryConfig(sub_keys=9, top_k=4, heads=2, key_dim=16, retrieval=retrieval)
        memory = Memory(config, tokens=2, width=16, seed=0).to(DEVICE)
        x_BTD = torch.randn(6, 2, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        with torch.autocast(DEVICE.type, dtype):
            slots_ML, weights_ML = memory.retrieve(x_BTD)
        exact_ML = memory.retrieve(x_BTD)[1]
        assert weights_ML.dtype == torch.float32 and not torch.equal(weights_ML, exact_ML)
        outputs.append((slots_ML, weights_ML))
    (slots, weights), (expected_slots, expected_weights) = outputs
    assert torch.equal(slots, expected_slots)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("setting", "device", "no_triton", "sizes", "chosen"),
    [
        ("auto", "cuda", None, {}, "triton"),
        ("auto", "cuda", "it is old", {}, "reference"),
        ("auto", "cpu", None, {}, "reference"),
        ("auto", "cuda", None, {"key_dim": 300}, "reference"),
        ("triton", "cpu", None, {}, "triton"),
        ("reference", "cuda", None, {}, "reference"),
        ("triton", "cuda", "it is old", {}, "memory.retrieval=triton: it is old; set memory.retrieval to auto or"),
        ("triton", "cuda", None, {"key_dim": 300}, "the kernels take key_dim up to 256, and it is 300; set memory"),
        ("triton", "cuda", None, {"sub_keys": 200, "top_k": 150}, "the kernels take top_k up to 128, and it is 150"),
    ],
)
def test_the_retrieval_is_chosen_by_device_and_sizes(
    setting: str, device: str, no_triton: str | None, sizes: dict, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product_keys, "why_no_triton", lambda _: no_triton)
    monkeypatch.setattr(product_keys, "interpreted", lambda: False)
    config = MemoryConfig(**({"sub_keys": 9, "top_k": 4, "key_dim": 8, "retrieval": setting} | sizes))
    keys = product_keys.ProductKeys(config, width=8)
    if " " in chosen:
        with pytest.raises(InputError, match=chosen):
            keys.back_end(torch.device(device))
    else:
        assert keys.back_end(torch.device(device)) == chosen


def test_everything_works_without_triton() -> None:
    """In a process that cannot import it."""
    script = """
import sys
sys.modules["triton"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import torch
from msn_dist.config import MemoryConfig
from msn_dist.errors import InputError
from msn_dist.memory import Memory
from msn_dist.sharding import ValueOptimizer
from msn_dist.sharding.lookup import choose_lookup, make_lookup
config = dict(sub_keys=9, top_k=4, key_dim=8)
Memory(MemoryConfig(**config), tokens=2, width=8, seed=0)(torch.randn(3, 2, 8)).sum().backward()
print(make_lookup("auto", 10, 8, ValueOptimizer(), torch.device("cpu")).name)
for attempt in (
    lambda: choose_lookup("triton", torch.device("cpu"), 8),
    lambda: Memory(MemoryConfig(retrieval="triton", **config), tokens=2, width=8, seed=0)(torch.randn(3, 2, 8)),
):
    try:
        attempt()
    except InputError as error:
        print(error)
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.stdout.splitlines() == [
        "fbgemm",
        "memory.lookup=triton: Triton is not installed; set memory.lookup to auto or reference",
        "memory.retrieval=triton: Triton is not installed; set memory.retrieval to auto or reference",
    ], result.stderr
