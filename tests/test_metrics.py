from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from msn_dist.errors import Diverged, InputError
from msn_dist.training.metrics import RankingMetrics
from ranks import run_ranks

TASKS = ["long_view", "like"]


def make_rows(rows: int, groups: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits with many ties, groups of 1 and more rows (some with one class only), NaN labels in the second task."""
    generator = torch.Generator().manual_seed(seed)
    logits_RK = (2 * torch.randn(rows, 2, generator=generator)).round(decimals=1)
    labels_RK = (torch.rand(rows, 2, generator=generator) < (0.5 * logits_RK - 0.5).sigmoid()).float()
    labels_RK[torch.rand(rows, generator=generator) < 0.3, 1] = torch.nan
    groups_R = (groups * torch.rand(rows, generator=generator) ** 2).long() * 10**12 - 7
    return logits_RK, labels_RK, groups_R


def expected(logits_R: torch.Tensor, labels_R: torch.Tensor, groups_R: torch.Tensor) -> dict[str, float]:
    """The same metrics by scikit-learn and a loop over the groups."""
    from sklearn.metrics import log_loss, roc_auc_score  # slow to import, and of no use to the ranks of a launch

    keep = ~labels_R.isnan()
    logits, labels, groups = (x[keep].numpy() for x in (logits_R.double(), labels_R.double(), groups_R))
    shares = 1 / (1 + np.exp(-logits))
    inside = [groups == group for group in np.unique(groups)]
    inside = [mask for mask in inside if len(set(labels[mask])) == 2]
    aucs = [roc_auc_score(labels[mask], logits[mask]) for mask in inside]
    logloss = log_loss(labels, shares)
    return {
        "auc": roc_auc_score(labels, logits),
        "gauc": np.average(aucs, weights=[mask.sum() for mask in inside]),
        "qauc": np.mean(aucs),
        "logloss": logloss,
        "ne": logloss / log_loss(labels, np.full_like(labels, labels.mean())),
        "calibration": shares.sum() / labels.sum(),
        "groups": len(inside),
        "rows": len(labels),
    }


def measure(tasks: list[str], *steps: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> dict[str, dict[str, float]]:
    metrics = RankingMetrics(tasks)
    for step in steps:
        metrics.update(*step)
    return metrics.compute()


def test_equal_scikit_learn_with_ties_and_missing_labels() -> None:
    logits_RK, labels_RK, groups_R = make_rows(5000, groups=400, seed=0)
    steps = zip(logits_RK.split(999), labels_RK.split(999), groups_R.split(999), strict=True)
    measured = measure(TASKS, *steps)
    for k, task in enumerate(TASKS):
        assert measured[task] == pytest.approx(expected(logits_RK[:, k], labels_RK[:, k], groups_R), rel=1e-12)
    assert measured["like"]["rows"] < measured["long_view"]["rows"] == 5000
    assert measured["long_view"]["groups"] < groups_R.unique().numel()  # some groups hold one class only


def test_int8_labels_and_large_groups_are_exact() -> None:
    """Sums of int8 overflow at 128; a rank sum kept in float32 is inexact from some 6,000 positives on."""
    logits_RK, labels_RK, groups_R = make_rows(50_000, groups=3, seed=1)
    measured = measure(["click"], (logits_RK[:, :1], labels_RK[:, :1].to(torch.int8), groups_R))
    assert measured["click"] == pytest.approx(expected(logits_RK[:, 0], labels_RK[:, 0], groups_R), rel=1e-12)


def test_all_scores_equal_is_one_half() -> None:
    labels_R1 = torch.tensor([[0.0], [1.0], [1.0], [0.0]])
    measured = measure(["click"], (torch.full((4, 1), 0.3), labels_R1, torch.tensor([5, 5, 6, 6])))["click"]
    assert [measured[name] for name in ("auc", "gauc", "qauc")] == [0.5, 0.5, 0.5]


def test_saturated_logits_keep_their_order_and_a_finite_loss() -> None:
    """The sigmoid of these logits is 1.0 in float32: a metric of probabilities sees ties."""
    logits_R1, labels_R1 = torch.tensor([[40.0], [60.0], [200.0]]), torch.tensor([[0.0], [1.0], [0.0]])
    measured = measure(["click"], (logits_R1, labels_R1, torch.zeros(3, dtype=torch.int64)))["click"]
    assert measured["auc"] == 0.5
    assert measured["logloss"] == pytest.approx(80.0)


def test_gauc_is_weighted_by_impressions_and_qauc_is_not() -> None:
    logits_R1 = torch.tensor([[1.0], [0.0], [0.0], [1.0], [2.0], [3.0], [9.0]])
    labels_R1 = torch.tensor([[1.0], [0.0], [1.0], [0.0], [0.0], [0.0], [1.0]])
    groups_R = torch.tensor([1, 1, 2, 2, 2, 2, 3])  # AUC 1 on 2 rows, AUC 0 on 4 rows, one class only
    measured = measure(["click"], (logits_R1, labels_R1, groups_R))["click"]
    assert measured["qauc"] == 0.5
    assert measured["gauc"] == pytest.approx(2 / 6)
    assert measured["groups"] == 2


def test_one_class_leaves_undefined_metrics_nan() -> None:
    rows = torch.zeros(3, 1), torch.zeros(3, 1), torch.arange(3)
    measured = measure(["click"], rows)["click"]
    undefined = {name for name, value in measured.items() if math.isnan(value)}
    assert undefined == {"auc", "gauc", "qauc", "ne", "calibration"}
    assert measured["logloss"] == pytest.approx(math.log(2))


def test_no_rows_are_nan_without_an_error() -> None:
    measured = measure(["click"])["click"]
    assert measured["rows"] == measured["groups"] == 0
    assert math.isnan(measured["auc"]) and math.isnan(measured["logloss"])


def test_diverged_model_is_an_error_that_counts_its_steps() -> None:
    logits_RK, labels_RK, groups_R = make_rows(10, groups=3, seed=2)
    diverged_RK = logits_RK.clone()
    diverged_RK[3, 1] = torch.nan
    with pytest.raises(Diverged, match="logits of 1 of 30 rows are NaN or infinite, in 1 of 3 evaluation steps"):
        measure(TASKS, *((z, labels_RK, groups_R) for z in (logits_RK, diverged_RK, logits_RK)))


def test_label_that_is_not_binary_is_named() -> None:
    labels_RK = torch.tensor([[0.0, 1.0], [1.0, 0.25]])
    with pytest.raises(InputError, match="label 'like': 1 of 2 rows hold a value other than 0 and 1"):
        measure(TASKS, (torch.zeros(2, 2), labels_RK, torch.zeros(2, dtype=torch.int64)))


def ranks_with_uneven_rows(rank: int, world_size: int) -> tuple[list[dict], str, int]:
    """The same rows on uneven ranks, then all on one; then a NaN on one rank; then no rows at all."""
    rows = make_rows(3001, groups=200, seed=3)
    measured = []
    for sizes in ([2000, 1001], [3001, 0]):
        shares = [part.split(sizes)[rank] for part in rows]
        metrics = RankingMetrics(TASKS)
        for start in range(0, sizes[rank], 700):
            metrics.update(*(part[start : start + 700] for part in shares))
        measured.append(metrics.compute())

    if rank == 1:
        metrics.update(torch.full((2, 2), torch.nan), torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(Diverged, match="diverged") as error:
        metrics.compute()
    return measured, str(error.value), RankingMetrics(TASKS).compute()["like"]["rows"]


def test_uneven_ranks_equal_one_process_on_every_rank() -> None:
    whole = measure(TASKS, make_rows(3001, groups=200, seed=3))
    measured, errors, rows_of_none = zip(*run_ranks(ranks_with_uneven_rows, 2), strict=True)
    assert measured[0] == measured[1]
    for task in TASKS:
        for split in measured[0]:
            assert split[task] == pytest.approx(whole[task], rel=1e-12)
    assert len(set(errors)) == 1 and "2 of 3,003 rows" in errors[0]
    assert rows_of_none == (0, 0)
