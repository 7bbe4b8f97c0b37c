"""Models: blocks against naive loops, features, losses, parameter counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from msn_dist.config import DCNv2Config, DLRMConfig, MemoryConfig, RankMixerConfig
from msn_dist.data.batch import Batch
from msn_dist.data.schema import History, Schema
from msn_dist.errors import InputError
from msn_dist.memory import Memory
from msn_dist.models.attention import TargetAttention
from msn_dist.models.blocks import FFN, GatedFFN
from msn_dist.models.features import Features, in_order
from msn_dist.models.linear import PerTokenLinear
from msn_dist.models.loss import task_losses
from msn_dist.models.moe import SMoE
from msn_dist.models.parameters import count_parameters
from msn_dist.models.ranker import Ranker
from msn_dist.models.rankmixer import RankMixerLayer, mix_tokens
from msn_dist.models.tokenizer import Tokenizer

SCHEMA = Schema(
    name="toy",
    tables={"user": 7, "item": 11, "tag": 5},
    ids={"user": "user", "item": "item", "tag": "tag"},
    histories={"liked": History(max_length=3, columns={"liked_item": "item", "liked_tag": "tag"})},
    dense=["age", "price"],
    labels=["click", "like"],
    group="user_group",
)
LISTS = {  # one list per row and key; the second row has no history, the third two tags
    "user": [[1], [2], [6]],
    "item": [[3], [10], [0]],
    "tag": [[4], [0], [1, 2]],
    "liked_item": [[1, 2], [], [5, 5, 9]],
    "liked_tag": [[0, 3], [], [1, 2, 4]],
}
MEMORY = MemoryConfig(sub_keys=8, top_k=4, key_dim=4)
SMALL = {"tokens": 4, "width": 16, "embedding_dim": 4}
BLOCKS = ["ffn", "gated_ffn", "smoe", "msn_ffn", "msn_smoe"]


def toy_batch() -> Batch:
    lists = [LISTS[key] for key in SCHEMA.sparse_keys]
    sparse = KeyedJaggedTensor(
        keys=SCHEMA.sparse_keys,
        values=torch.tensor([value for rows in lists for row in rows for value in row]),
        lengths=torch.tensor([len(row) for rows in lists for row in rows]),
    )
    labels_BK = torch.tensor([[1.0, torch.nan], [0.0, 1.0], [1.0, 0.0]])
    return Batch(sparse, torch.tensor([[20.0, -0.5], [30.0, 2.0], [0.0, 1e6]]), labels_BK, torch.arange(3))


def backbones() -> dict[str, tuple]:
    cases = {block: (RankMixerConfig(block=block, **SMALL), MEMORY if "msn" in block else None) for block in BLOCKS}
    cases["attention"] = (RankMixerConfig(block="ffn", attention=True, **SMALL), None)
    for memory in (None, MEMORY):
        suffix = "" if memory is None else "_memory"
        cases["dlrm" + suffix] = (DLRMConfig(backbone="dlrm", hidden=[8, 8], attention=True, **SMALL), memory)
        cases["dcnv2" + suffix] = (DCNv2Config(backbone="dcnv2", hidden=[8], **SMALL), memory)
    cases["dcnv2_low_rank"] = (DCNv2Config(backbone="dcnv2", hidden=[8], cross_rank=2, **SMALL), None)
    return cases


def randomise(tables: nn.Module) -> None:
    for parameter in tables.parameters():
        nn.init.normal_(parameter)


@pytest.mark.parametrize("rows", [3, 0])
@pytest.mark.parametrize("name", backbones())
def test_every_backbone_trains_all_its_dense_weights_on_any_number_of_rows(name, rows):
    model, memory = backbones()[name]
    ranker = Ranker(SCHEMA, model, memory, seed=0)
    features_BF = torch.randn(rows, ranker.features.width)
    hidden_BH, auxiliary = ranker.backbone(features_BF)
    logits_BK = ranker.heads(hidden_BH)
    assert logits_BK.shape == (rows, 2)
    assert auxiliary.shape == () and (auxiliary > 0) == ("smoe" in name and rows > 0)
    sums_K = task_losses(logits_BK, torch.ones(rows, 2))
    (sums_K.sum() + auxiliary).backward()
    for path, parameter in [*ranker.backbone.named_parameters(), *ranker.heads.named_parameters()]:
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
        assert rows or not parameter.grad.any(), path


@pytest.mark.parametrize("name", backbones())
def test_a_ranker_gives_one_float32_logit_per_label(name):
    model, memory = backbones()[name]
    with torch.autocast("cpu", torch.bfloat16):
        output = Ranker(SCHEMA, model, memory, seed=0)(toy_batch())
    assert output.logits_BK.shape == (3, 2) and output.logits_BK.dtype == torch.float32
    assert output.logits_BK.isfinite().all() and output.auxiliary.shape == ()


class Tracer(torch.fx.Tracer):
    """Looks into everything but what TorchRec's pipelines leave alone: tables, and here the memory."""

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return isinstance(module, EmbeddingBagCollection | EmbeddingCollection | Memory) or super().is_leaf_module(
            module, path
        )


@pytest.mark.parametrize("name", backbones())
def test_a_pipeline_can_trace_the_ranker(name):
    model, memory = backbones()[name]
    ranker, batch = Ranker(SCHEMA, model, memory, seed=0), toy_batch()
    traced = torch.fx.GraphModule(ranker, Tracer().trace(ranker))
    torch.testing.assert_close(traced(batch).logits_BK, ranker(batch).logits_BK)


def test_memories_are_named_by_layer():
    model = RankMixerConfig(block="msn_ffn", layers=4, **SMALL)
    assert list(Ranker(SCHEMA, model, MEMORY, seed=0).memories()) == ["layer1", "layer3"]
    assert Ranker(SCHEMA, RankMixerConfig(block="ffn", **SMALL), seed=0).memories() == {}
    assert list(Ranker(SCHEMA, DLRMConfig(backbone="dlrm", **SMALL), MEMORY, seed=0).memories()) == ["layer0"]


def test_dense_weights_depend_on_the_seed_and_on_nothing_else():
    model = RankMixerConfig(block="msn_smoe", attention=True, **SMALL)
    torch.manual_seed(1)
    first = Ranker(SCHEMA, model, MEMORY, seed=5)
    after = torch.rand(1)
    torch.manual_seed(2)
    second = Ranker(SCHEMA, model, MEMORY, seed=5, device="meta")
    other = Ranker(SCHEMA, model, MEMORY, seed=6)
    different = []
    for (path, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        if "tables" not in path and ".values." not in path:
            assert torch.equal(a, b), path
            different.append(not torch.equal(a, c))
    assert sum(different) > len(different) / 3  # biases, norms and Theta start the same
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)


def test_features_are_means_of_lists_and_compressed_dense_numbers():
    features = Features(SCHEMA, 4, attention=False)
    randomise(features)
    batch = toy_batch()
    weights = {name: bag.weight for name, bag in features.id_tables.embedding_bags.items()}
    rows = []
    for row in range(3):
        parts = []
        for key in ("user", "item", "tag", "liked_item", "liked_tag"):
            ids = LISTS[key][row]
            parts.append(weights[SCHEMA.table_of(key)][ids].mean(0) if ids else torch.zeros(4))
        parts.append(torch.sign(batch.dense_BF[row]) * torch.log1p(batch.dense_BF[row].abs()))
        rows.append(torch.cat(parts))
    expected_BF = torch.stack(rows)
    assert features.width == expected_BF.shape[1] == 22
    torch.testing.assert_close(features(batch), expected_BF)


def test_attention_keeps_the_means_and_adds_one_vector_per_history():
    plain = Features(SCHEMA, 4, attention=False)
    attentive = Features(SCHEMA, 4, attention=True)
    randomise(plain)
    randomise(attentive)
    tables = plain.id_tables.embedding_bags
    with torch.no_grad():
        attentive.id_tables.embedding_bags["user"].weight.copy_(tables["user"].weight)
        for name, table in attentive.sequence_tables.embeddings.items():
            table.weight.copy_(tables[name].weight)
    batch = toy_batch()
    expected_BF, out_BF = plain(batch), attentive(batch)
    assert attentive.width == out_BF.shape[1] == plain.width + 8
    torch.testing.assert_close(out_BF[:, :20], expected_BF[:, :20])
    torch.testing.assert_close(out_BF[:, 28:], expected_BF[:, 20:])

    item, tag = tables["item"].weight, tables["tag"].weight
    for row in range(3):
        target_F = torch.cat([item[LISTS["item"][row]].mean(0), tag[LISTS["tag"][row]].mean(0)])
        events = list(zip(LISTS["liked_item"][row], LISTS["liked_tag"][row], strict=True))
        expected_F = torch.zeros(8)
        if events:
            e_NF = torch.stack([torch.cat([item[i], tag[t]]) for i, t in events])
            q_NF = target_F.expand_as(e_NF)
            score_N1 = attentive.attention["liked"].score(torch.cat([q_NF, e_NF, q_NF - e_NF, q_NF * e_NF], 1))
            expected_F = (score_N1.softmax(0) * e_NF).sum(0)
        torch.testing.assert_close(out_BF[row, 20:28], expected_F)


def test_attention_weights_stay_finite_for_extreme_scores():
    attention = TargetAttention(2)
    for parameter in attention.parameters():
        nn.init.constant_(parameter, 100.0)
    events_NF = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], requires_grad=True)
    out_BF = attention(torch.ones(2, 2), events_NF, torch.tensor([3, 0]))
    out_BF.sum().backward()
    torch.testing.assert_close(out_BF, torch.tensor([[5.0, 6.0], [0.0, 0.0]]))
    assert events_NF.grad.isfinite().all()


def test_attention_without_a_history_is_refused():
    schema = SCHEMA.model_copy(update={"histories": {}})
    with pytest.raises(InputError, match="'toy' has no histories"):
        Features(schema, 4, attention=True)


def test_pooled_features_keep_the_order_of_the_schema_whatever_the_plan():
    shuffled = KeyedTensor(["b", "c", "a"], [2, 1, 2], torch.tensor([[3.0, 4.0, 5.0, 1.0, 2.0]]))
    assert in_order(shuffled, ["a", "b", "c"]).tolist() == [[1.0, 2.0, 3.0, 4.0, 5.0]]


def test_tokenizer_cuts_even_chunks_and_pads_the_last():
    tokenizer = Tokenizer(7, tokens=3, width=5)
    features_BF = torch.randn(2, 7)
    padded_BF = torch.cat([features_BF, torch.zeros(2, 2)], 1)
    weight_TIO, bias_TO = tokenizer.project.weight_TIO, tokenizer.project.bias_TO
    for token, chunk_BI in enumerate(padded_BF.split(3, 1)):
        expected_BD = chunk_BI @ weight_TIO[token] + bias_TO[token]
        torch.testing.assert_close(tokenizer(features_BF)[:, token], expected_BD)


def test_token_mixing_equals_a_loop():
    x_BTD = torch.randn(2, 3, 12)
    mixed_BTD = mix_tokens(x_BTD)
    for row in range(2):
        for head in range(3):
            expected_D = torch.cat([x_BTD[row, token, 4 * head : 4 * head + 4] for token in range(3)])
            assert torch.equal(mixed_BTD[row, head], expected_D)


@pytest.mark.parametrize("kind", [FFN, GatedFFN])
def test_per_token_networks_equal_a_loop_over_tokens(kind):
    block = kind(3, 8, 12)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x_BTD = torch.randn(5, 3, 8)
    y_BTD, balance = block(x_BTD)
    assert balance == 0

    def apply(linear: PerTokenLinear, x_BI: torch.Tensor, token: int) -> torch.Tensor:
        return functional.linear(x_BI, linear.weight_TIO[token].T, linear.bias_TO[token])

    for token in range(3):
        x_BD = x_BTD[:, token]
        if kind is FFN:
            hidden_BH = functional.gelu(apply(block.up, x_BD, token))
        else:
            hidden_BH = functional.silu(apply(block.gate, x_BD, token)) * apply(block.up, x_BD, token)
        torch.testing.assert_close(y_BTD[:, token], apply(block.down, hidden_BH, token))


def test_gated_ffn_has_about_as_many_weights_as_ffn():
    sizes = [sum(parameter.numel() for parameter in kind(8, 64, 128).parameters()) for kind in (FFN, GatedFFN)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


def naive_smoe(block: SMoE, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every expert on every token, weighted by 0 where it is not chosen; balance from its definition."""
    tokens, _, experts = block.router.weight_TIO.shape
    rows, outputs, balances = len(x_BTD), [], []
    for token in range(tokens):
        x_BD = x_BTD[:, token]
        scores_BE = x_BD @ block.router.weight_TIO[token] + block.router.bias_TO[token]
        worst_B1 = scores_BE.sort(descending=True).values[:, block.active - 1 : block.active]
        chosen_BE = scores_BE >= worst_B1
        weight_BE = scores_BE.masked_fill(~chosen_BE, -torch.inf).softmax(1)
        y_BD = torch.zeros_like(x_BD)
        for expert in range(experts):
            group = token * experts + expert
            hidden_BH = functional.gelu(x_BD @ block.up_GDH[group])
            y_BD = y_BD + weight_BE[:, expert : expert + 1] * (hidden_BH @ block.down_GHD[group])
        outputs.append(y_BD)
        share_E = chosen_BE.sum(0) / (rows * block.active)
        balances.append(experts * (share_E * scores_BE.softmax(1).mean(0)).sum())
    return torch.stack(outputs, 1), torch.stack(balances).mean()


@pytest.mark.parametrize("bias", [0.0, 100.0], ids=["even", "one expert gets every token, others none"])
def test_smoe_equals_computing_every_expert_and_so_do_its_gradients(bias):
    torch.manual_seed(0)
    block = SMoE(3, 8, 16, experts=5, active=2)
    with torch.no_grad():
        block.router.bias_TO[:, 1] += bias
    x_BTD = torch.randn(40, 3, 8, requires_grad=True)
    gradient_BTD = torch.randn(40, 3, 8)
    results = []
    for forward in (block, lambda x_BTD: naive_smoe(block, x_BTD)):
        y_BTD, balance = forward(x_BTD)
        inputs = [x_BTD, *block.parameters()]
        gradients = torch.autograd.grad((y_BTD * gradient_BTD).sum() + balance, inputs)
        results.append([y_BTD, balance, *gradients])
    for fast, naive in zip(*results, strict=True):
        torch.testing.assert_close(fast, naive, rtol=1e-4, atol=1e-5)


def test_smoe_balance_is_one_when_even_and_higher_when_skewed():
    block = SMoE(2, 8, 8, experts=4, active=1)
    nn.init.zeros_(block.router.weight_TIO)
    _, even = block(torch.randn(6, 2, 8))
    assert even.item() == pytest.approx(1.0)
    block.router.bias_TO.data[:, 0] = 50.0
    _, skewed = block(torch.randn(6, 2, 8))
    assert skewed.item() == pytest.approx(4.0)


def test_smoe_runs_under_autocast():
    block = SMoE(2, 8, 16, experts=3, active=2)
    x_BTD = torch.randn(9, 2, 8)
    expected_BTD, _ = block(x_BTD)
    with torch.autocast("cpu", torch.bfloat16):
        y_BTD, balance = block(x_BTD)
    assert balance.dtype == torch.float32
    assert (y_BTD.float() - expected_BTD).norm() < 0.05 * expected_BTD.norm()


def test_smoe_refuses_widths_that_the_grouped_product_cannot_take():
    with pytest.raises(InputError, match="model.width=12 is not a multiple of 8"):
        SMoE(2, 12, 16, experts=3, active=2)


class Halve(nn.Module):
    """Stands in for a memory."""

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return x_BTD * 0.5


def test_memory_gates_the_network_and_not_the_residual():
    layer = RankMixerLayer(8, FFN(4, 8, 16), memory=Halve())
    x_BTD = torch.randn(3, 4, 8)
    s_BTD = layer.mixing_norm(x_BTD + mix_tokens(x_BTD))
    expected_BTD = layer.network_norm(s_BTD + layer.network(0.5 * s_BTD)[0])
    torch.testing.assert_close(layer(x_BTD)[0], expected_BTD)


def test_rows_without_a_label_add_nothing_to_loss_or_gradient():
    logits_BK = torch.randn(4, 2, requires_grad=True)
    labels_BK = torch.tensor([[1.0, torch.nan], [0.0, torch.nan], [torch.nan, 1.0], [1.0, torch.nan]])
    sums_K = task_losses(logits_BK, labels_BK)
    p_BK = logits_BK.detach().sigmoid()
    expected_K = -torch.stack([p_BK[0, 0].log() + (1 - p_BK[1, 0]).log() + p_BK[3, 0].log(), p_BK[2, 1].log()])
    torch.testing.assert_close(sums_K.detach(), expected_K)
    sums_K.sum().backward()
    expected_BK = torch.where(labels_BK.isnan(), 0.0, p_BK - labels_BK)
    torch.testing.assert_close(logits_BK.grad, expected_BK)


def test_parameter_counts_equal_a_count_by_hand():
    model = RankMixerConfig(block="smoe", layers=1, experts=6, active_experts=2, ffn_ratio=2.0, **SMALL)
    counts = count_parameters(Ranker(SCHEMA, model, seed=0, device="meta"))
    id_tables = (7 + 11 + 5) * 4
    tokenizer = 4 * (6 * 16 + 16)  # 5 keys * 4 + 2 dense = 22 features: chunks of 6
    norms = 2 * 2 * 16
    router = 4 * (16 * 6 + 6)
    expert = 2 * 16 * 32
    heads = 16 * 2 + 2
    dense = tokenizer + norms + router + 4 * 6 * expert + heads
    read = (3 + 2 * 3) * 4
    assert counts == {
        "total": dense + id_tables,
        "activated": dense - 4 * 4 * expert + read,
        "dense": dense,
        "id_tables": id_tables,
        "memory_values": 0,
    }


def test_a_memory_activates_top_k_values_per_token_and_head():
    model = RankMixerConfig(block="msn_ffn", layers=1, **SMALL)
    memory = MemoryConfig(sub_keys=8, top_k=4, heads=2, key_dim=4)
    counts = count_parameters(Ranker(SCHEMA, model, memory, seed=0))
    assert counts["memory_values"] == 8 * 8 * 16
    assert counts["activated"] == counts["dense"] + (3 + 2 * 3) * 4 + 4 * 2 * 4 * 16
