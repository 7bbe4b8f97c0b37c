"""The plain memory: exact retrieval, every variant, placement, initial values, health."""

from __future__ import annotations

import math

import pytest
import torch

from msn_dist.config import MemoryConfig
from msn_dist.errors import InputError
from msn_dist.kernels import reference
from msn_dist.memory import Memory, MemoryValues, Placement
from msn_dist.memory.health import SlotUsage
from msn_dist.memory.placement import initial_values
from msn_dist.memory.product_keys import AxisNorm
from msn_dist.memory.values import VALUE_DTYPES


@pytest.mark.parametrize(("sub_keys", "k"), [(1, 1), (7, 7), (20, 1), (20, 8), (63, 32), (100, 64)])
def test_pair_shortcut_equals_the_search_over_all_slots(sub_keys: int, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    row, col = torch.randn(2, 40, sub_keys, generator=generator, dtype=torch.float64)
    scores, slots = reference.product_key_topk(row, col, k)
    expected_scores, expected_slots = reference.product_key_topk_naive(row, col, k)
    assert torch.equal(scores, expected_scores)
    assert torch.equal(slots, expected_slots)


def test_pair_shortcut_keeps_equal_scores_apart() -> None:
    row = col = torch.zeros(3, 8)
    scores, slots = reference.product_key_topk(row, col, 8)
    assert torch.equal(scores, torch.zeros(3, 8))
    assert all(len(set(chosen)) == 8 for chosen in slots.tolist())


def test_the_shortcut_considers_119_pairs_at_k_32() -> None:
    assert len(reference.pair_candidates(32)[0]) == 119
    assert len(reference.pair_candidates(64)[0]) == 280


def normalised(norm: AxisNorm, axis: int, x: torch.Tensor) -> torch.Tensor:
    xhat = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return xhat * norm.gamma_AE[axis] + norm.beta_AE[axis]


def test_memory_equals_a_loop_over_tokens_heads_and_slots() -> None:
    config = MemoryConfig(sub_keys=6, top_k=3, heads=2, key_dim=4, value_dim=8, share="group", groups=2)
    torch.manual_seed(0)
    memory = Memory(config, tokens=4, width=12, seed=3).double()
    for parameter in memory.keys.parameters():  # no two axes or heads alike, norms included
        torch.nn.init.normal_(parameter)
    x_BTD = torch.randn(5, 4, 12, dtype=torch.float64)
    gated_BTD = memory(x_BTD)
    placement = memory.values.placement
    for sample in range(5):
        for token in range(4):
            x = x_BTD[sample, token]
            retrieved = torch.zeros(8, dtype=torch.float64)
            for head in range(2):
                scores = []
                for axis in range(2):
                    first = (2 * axis + head) * 4
                    query = normalised(memory.keys.query_norm, axis, memory.keys.query_XD[first : first + 4] @ x)
                    mixed = memory.keys.codes_AHNE[axis, head] @ memory.keys.theta[axis, head].T
                    keys = normalised(memory.keys.key_norm, axis, mixed)
                    scores.append(keys @ query / math.sqrt(4))
                every = (scores[0][:, None] + scores[1]).flatten()
                best, slots = every.topk(3)
                for weight, slot in zip(best.softmax(0), slots + (token // 2) * 36, strict=True):
                    # retrieval weights are float32, as everywhere
                    retrieved += weight * memory.values.weight[placement.row_of(slot)]
            expected = x * torch.tanh(memory.gate.project.weight @ retrieved)
            torch.testing.assert_close(gated_BTD[sample, token], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gate", ["tanh", "one_plus_tanh", "sigmoid", "linear", "concat"])
@pytest.mark.parametrize("theta", ["none", "key", "mix"])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_every_variant_sends_gradients_to_all_parameters(gate: str, theta: str, layer_norm: bool) -> None:
    config = MemoryConfig(sub_keys=8, top_k=4, key_dim=4, gate=gate, theta=theta, layer_norm=layer_norm, share="token")
    torch.manual_seed(0)
    memory = Memory(config, tokens=2, width=8, seed=0)
    x_BTD = torch.randn(50, 2, 8, requires_grad=True)
    out = memory(x_BTD)
    assert out.shape == x_BTD.shape
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in [*memory.named_parameters(), ("x", x_BTD)]:
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_gradients_agree_with_finite_differences() -> None:
    config = MemoryConfig(sub_keys=5, top_k=3, key_dim=4, value_dim=4)
    torch.manual_seed(1)
    memory = Memory(config, tokens=2, width=4, seed=0).double()
    memory.keys.forward = _in_double(memory.keys)
    x_BTD = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(memory, x_BTD, eps=1e-7, atol=1e-6)


def _in_double(keys):
    """The same retrieval without the cast to float32, which finite differences cannot see through."""

    def forward(x_BTD):
        scores = (scores_BTHN.flatten(0, 2) for scores_BTHN in keys.scores(x_BTD))
        scores_MK, slots_MK = reference.product_key_topk(*scores, keys.top_k)
        shape = (*x_BTD.shape[:2], 1, keys.top_k)
        return slots_MK.view(shape), scores_MK.softmax(-1).view(shape)

    return forward


def test_theta_moves_sub_keys_that_no_query_selected() -> None:
    def moved(theta: str) -> int:
        torch.manual_seed(0)
        # without LayerNorm, whose own scale moves all keys
        config = MemoryConfig(sub_keys=64, top_k=2, key_dim=8, theta=theta, layer_norm=False)
        memory = Memory(config, tokens=1, width=8, seed=0)
        before_HNE = memory.keys.keys().detach()
        memory(torch.randn(1, 1, 8)).sum().backward()
        with torch.no_grad():
            for parameter in memory.keys.parameters():
                parameter -= 0.1 * parameter.grad
        return int((memory.keys.keys() != before_HNE).any(-1).sum())

    assert moved("none") <= 2
    assert moved("key") == 64


@pytest.mark.parametrize("slots", [1, 2, 49, 100, 2**12, 10_007])
def test_placement_is_a_bijection(slots: int) -> None:
    placement = Placement.permuted(slots)
    every = torch.arange(slots)
    rows = placement.row_of(every)
    assert torch.equal(rows.sort().values, every)
    assert torch.equal(placement.slot_of(rows), every)


def test_placement_is_exact_where_products_overflow_64_bits() -> None:
    placement = Placement.permuted(2**36)
    slots = torch.tensor([0, 1, 12_345_678_901, 2**36 - 1])
    rows = placement.row_of(slots)
    assert rows.tolist() == [(placement.factor * int(slot) + placement.shift) % 2**36 for slot in slots]
    assert torch.equal(placement.slot_of(rows), slots)


def test_placement_spreads_the_slots_of_one_sub_key_over_all_owners() -> None:
    sub_keys, world = 256, 8
    row_of_one_sub_key = Placement.permuted(sub_keys**2).row_of(17 * sub_keys + torch.arange(sub_keys))
    per_owner = torch.bincount(row_of_one_sub_key // (sub_keys**2 // world), minlength=world)
    assert per_owner.max() <= 1.1 * sub_keys / world


def test_initial_values_do_not_depend_on_how_rows_are_cut() -> None:
    whole = MemoryValues(1000, 12, init_std=0.5, seed=4).weight.detach()
    found = torch.full_like(whole, math.nan)
    for rows, columns in [((0, 1), (0, 12)), ((1, 333), (0, 12)), ((333, 1000), (0, 5)), ((333, 1000), (5, 12))]:
        part = found[slice(*rows), slice(*columns)]
        initial_values(Placement.permuted(1000), rows[0], part, std=0.5, seed=4, first_column=columns[0])
    assert torch.equal(found, whole)
    assert abs(whole.mean()) < 0.02 and abs(whole.std() - 0.5) < 0.01
    assert not torch.equal(whole, MemoryValues(1000, 12, init_std=0.5, seed=5).weight)
    assert len(whole.unique()) > 11_000  # rows and columns differ


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_values_of_16_bits_are_those_of_32_rounded_and_are_summed_in_float32(kind: str) -> None:
    memories = []
    for value_dtype in (kind, "fp32"):
        torch.manual_seed(0)
        config = MemoryConfig(sub_keys=8, top_k=4, key_dim=4, value_dtype=value_dtype)
        memories.append(Memory(config, tokens=2, width=8, seed=3))
    half, full = memories
    dtype = VALUE_DTYPES[kind]
    assert half.values.weight.dtype == dtype
    assert torch.equal(half.values.weight, full.values.weight.to(dtype))
    full.values.weight.data.copy_(half.values.weight)
    x_BTD = torch.randn(50, 2, 8)
    found_BTD, expected_BTD = half(x_BTD), full(x_BTD)
    assert torch.equal(found_BTD, expected_BTD)
    found_BTD.square().sum().backward()
    expected_BTD.square().sum().backward()
    torch.testing.assert_close(half.keys.codes_AHNE.grad, full.keys.codes_AHNE.grad)
    error = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(half.values.weight.grad.float(), full.values.weight.grad, rtol=error, atol=error)


def test_a_memory_made_on_the_meta_device_starts_as_any_other() -> None:
    with torch.device("meta"):
        memory = Memory(MemoryConfig(sub_keys=8, top_k=4, key_dim=4, share="token"), tokens=2, width=8, seed=3)
    memory.to_empty(device="cpu")
    for module in memory.modules():  # as DistributedModelParallel does
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    torch.manual_seed(0)
    expected = Memory(MemoryConfig(sub_keys=8, top_k=4, key_dim=4, share="token"), tokens=2, width=8, seed=3)
    assert torch.equal(memory.values.weight, expected.values.weight)
    assert torch.equal(memory.keys.theta, expected.keys.theta)
    assert 0.5 < memory.keys.codes_AHNE.std() < 1.5
    expected.load_state_dict(memory.state_dict())
    x_BTD = torch.randn(5, 2, 8)
    assert torch.equal(memory(x_BTD), expected(x_BTD))


def test_under_autocast_queries_and_gate_share_one_copy_of_the_tokens() -> None:
    torch.manual_seed(0)
    memory = Memory(MemoryConfig(sub_keys=8, top_k=4, key_dim=6), tokens=2, width=8, seed=0)
    x_BTD = torch.randn(50, 2, 8, requires_grad=True)
    kept: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        with torch.autocast("cpu", torch.bfloat16):
            found_BTD = memory(x_BTD)
    assert x_BTD.data_ptr() not in kept
    assert sum(x.numel() == x_BTD.numel() and x.dtype == torch.bfloat16 for x in kept.values()) == 1
    with torch.autocast("cpu", torch.bfloat16):  # each with a copy of its own
        expected_BTD = memory.gate(x_BTD, memory.values(*memory.retrieve(x_BTD)).unflatten(0, (50, 2)))
    g_BTD = torch.randn(50, 2, 8).bfloat16()
    for found, expected in zip(
        (found_BTD, *torch.autograd.grad(found_BTD, x_BTD, g_BTD)),
        (expected_BTD, *torch.autograd.grad(expected_BTD, x_BTD, g_BTD)),
        strict=True,
    ):
        assert found.dtype == expected.dtype
        assert (found - expected).norm() < 0.01 * expected.norm()


def test_values_of_a_width_that_no_lookup_takes_are_refused() -> None:
    with pytest.raises(InputError, match="width 18 are not a multiple of 4"):
        Memory(MemoryConfig(sub_keys=8, top_k=4), tokens=2, width=18, seed=0)


def test_a_count_beyond_31_bits_is_still_a_count() -> None:
    usage = SlotUsage(200, "cpu")
    usage.window_R[3] = -(2**31)  # what one more hit makes of 2^31 - 1
    health = usage.read(200)
    assert health.window_used_share == health.used_share == 1 / 200 and health.entropy_ratio == pytest.approx(0.0)


def test_a_window_without_hits_has_no_entropy() -> None:
    assert math.isnan(SlotUsage(200, "cpu").read(200).entropy_ratio)


def test_health_of_known_hits() -> None:
    usage = SlotUsage(200, "cpu")
    usage.count(torch.arange(100).repeat(3))  # 100 slots three times
    usage.count(torch.zeros(700, dtype=torch.int64))  # one of them 700 times more
    health = usage.read(200)
    shares = torch.tensor([703.0] + [3.0] * 99) / 1000
    entropy = float(-(shares * shares.log()).sum())
    assert health.used_share == health.window_used_share == 0.5
    assert health.dead_slots == 100
    assert health.hits == 1000
    assert health.entropy_ratio == pytest.approx(entropy / math.log(200), abs=1e-5)
    assert health.kl_to_uniform == pytest.approx(math.log(200) - entropy, abs=1e-4)
    assert health.top1pct_share == pytest.approx(0.706)
    assert health.histogram == [(0, 100), (3, 99), (703, 1)]

    usage.count(torch.arange(150, 200))
    health = usage.read(200)
    assert health.used_share == 0.75 and health.window_used_share == 0.25
    assert health.entropy_ratio == pytest.approx(math.log(50) / math.log(200))


def test_evaluation_does_not_count_hits() -> None:
    memory = Memory(MemoryConfig(sub_keys=8, top_k=4, key_dim=4), tokens=2, width=8, seed=0).eval()
    memory(torch.randn(3, 2, 8))
    assert memory.values.health().hits == 0
