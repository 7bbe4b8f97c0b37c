"""Learning rates over time, and what decays."""

from __future__ import annotations

import pytest
from torch import nn

from msn_dist.config import MemoryConfig, OptimizerConfig, RankMixerConfig
from msn_dist.models.ranker import Ranker
from msn_dist.training.optimizers import Optimizers
from tiny_data import SCHEMA


def test_rates_warm_up_then_fall_and_the_multiplier_of_the_values_decays() -> None:
    config = OptimizerConfig.model_validate(
        {
            "dense": {"lr": 1.0},
            "ids": {"lr": 3.0},
            "values": {"multiplier": 10.0, "final_multiplier": 2.0},
            "warmup_steps": 10,
        }
    )
    model = nn.ModuleDict({"module": nn.Linear(1, 1)})
    rates = Optimizers(model, [], config, total_steps=110).rates
    assert rates(0) == pytest.approx((0.001, 0.003, 0.01))
    assert rates(5) == pytest.approx((0.5005, 3 * 0.5005, 0.5005 * (10 - 8 * 5 / 109)))
    assert rates(10) == pytest.approx((1.0, 3.0, 10 - 8 * 10 / 109))
    assert rates(60) == pytest.approx((0.5, 1.5, 0.5 * (10 - 8 * 60 / 109)))
    assert rates(109) == pytest.approx((0.01, 0.03, 0.02))

    assert rates(500) == pytest.approx((0.0, 0.0, 0.0))

    constant = config.model_copy(update={"schedule": "constant"})
    optimizers = Optimizers(model, [], constant, total_steps=110)
    assert optimizers.rates(109)[:2] == (1.0, 3.0)
    assert optimizers.set_rates(5) == optimizers.rates(5)[0] == optimizers.dense.param_groups[0]["lr"]


def test_biases_norms_and_memory_keys_do_not_decay_and_a_rank_without_id_tables_has_nothing_to_forget() -> None:
    config = OptimizerConfig.model_validate({"dense": {"weight_decay": 0.1}, "ids": {"decay": 0.5}})
    memory = MemoryConfig(sub_keys=8, top_k=4, key_dim=4)
    ranker = Ranker(SCHEMA, RankMixerConfig(tokens=2, width=16, layers=1), memory, seed=0)
    optimizers = Optimizers(nn.ModuleDict({"module": ranker}), [], config, total_steps=10)
    optimizers.set_rates(0)
    names = {parameter: name for name, parameter in ranker.named_parameters()}
    decaying = {names[p] for group in optimizers.dense.param_groups if group["weight_decay"] for p in group["params"]}
    kinds = {name.rsplit(".", 1)[-1] for name in decaying}
    assert kinds == {"weight", "weight_TIO", "query_XD"}
    assert not {name for name in decaying if "norm" in name}
