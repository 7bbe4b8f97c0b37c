"""The synthetic set: repeatable, and as predictable as its planted.json says."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from msn_dist.data import synthetic
from msn_dist.data.parquet import ParquetReader
from msn_dist.data.schema import load_schema
from msn_dist.data.synthetic import Planted
from msn_dist.errors import InputError


def read(folder, split: str = "train") -> pa.Table:
    return pq.read_table(folder / split, columns=None)


def test_same_seed_same_rows_and_more_rows_only_add(tmp_path):
    for name, rows, seed in (("a", 20_000, 1), ("b", 20_000, 1), ("longer", 30_000, 1), ("other", 20_000, 2)):
        synthetic.prepare(tmp_path / name, rows=rows, users=500, items=300, clusters=8, seed=seed)
    a, b, longer, other = (read(tmp_path / name) for name in ("a", "b", "longer", "other"))
    assert a.equals(b) and not a.equals(other) and (a.num_rows, longer.num_rows) == (20_000, 30_000)
    full = 2 * synthetic.ROW_GROUP
    assert a.slice(0, full).equals(longer.slice(0, full))
    reader = ParquetReader(tmp_path / "a" / "valid", load_schema(tmp_path / "a"), 512)
    assert sum(len(batch) for batch in reader) == reader.num_rows == 2_000


def test_second_call_with_the_same_settings_writes_nothing_and_other_settings_write_again(tmp_path):
    synthetic.prepare(tmp_path / "a", rows=1000, seed=1)
    before = (tmp_path / "a" / "schema.yaml").stat().st_mtime_ns
    synthetic.prepare(tmp_path / "a", rows=1000, seed=1)
    assert (tmp_path / "a" / "schema.yaml").stat().st_mtime_ns == before
    synthetic.prepare(tmp_path / "a", rows=2000, seed=1)
    assert read(tmp_path / "a").num_rows == 2000
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_reported_bayes_metrics_are_those_of_the_true_probabilities(tmp_path):
    settings = dict(users=5_000, items=2_000, clusters=32, strength=2.0, zipf=1.05, observed=True, seed=3)
    synthetic.prepare(tmp_path / "a", rows=200_000, **settings)
    report = json.loads((tmp_path / "a" / "planted.json").read_text())["train"]
    blocks = [Planted(**settings).rows("train", block, synthetic.ROW_GROUP) for block in range(10)]
    for label in ("click", "like"):
        outcome = np.concatenate([columns[label] for columns, _ in blocks])
        for who, name in enumerate(("bayes", "without_memory")):
            chance = np.concatenate([chances[label][who] for _, chances in blocks])
            assert roc_auc_score(outcome, chance) == pytest.approx(report[label][name]["auc"], abs=0.01)
            assert log_loss(outcome, chance) == pytest.approx(report[label][name]["logloss"], abs=0.01)
        assert report[label]["bayes"]["auc"] > report[label]["without_memory"]["auc"] + 0.1
    assert report["like"]["rate"] < 0.1 < report["click"]["rate"]


def test_the_planted_table_shows_in_neither_cluster_alone():
    columns, _ = Planted(5_000, 2_000, 32, 2.0, 1.05, True, 3).rows("train", 0, 200_000)
    pair = columns["segment"] * 32 + columns["category"]

    def spread(key: np.ndarray) -> float:
        """Impression-weighted deviation of the click rate between the values of `key`."""
        count, clicks = np.bincount(key), np.bincount(key, columns["click"])
        count, clicks = count[count > 0], clicks[count > 0]
        return float(np.sqrt(np.average((clicks / count - columns["click"].mean()) ** 2, weights=count)))

    assert spread(pair) > 0.3 > 2 * max(spread(columns["segment"]), spread(columns["category"]))


def test_ids_follow_a_zipf_law_within_their_range():
    columns, _ = Planted(1_000, 97, 4, 1.0, 1.2, False, 0).rows("test", 5, 50_000)
    for name, size in (("user_id", 1_000), ("item_id", 97)):
        counts = np.sort(np.bincount(columns[name], minlength=size))[::-1]
        assert counts[: size // 10].sum() > 25_000
        assert len(counts) == size and counts[0] > 1.5 * counts[1] > 2 * counts[4]
    assert "segment" not in columns


def test_a_folder_that_holds_anything_else_is_not_replaced(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").touch()
    for target in (tmp_path / "runs", tmp_path / "runs" / "demo", tmp_path / "runs" / "demo" / "data"):
        with pytest.raises(InputError, match=f"{target}: "):
            synthetic.prepare(target, rows=100)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["demo"]
    (tmp_path / "empty").mkdir()
    synthetic.prepare(tmp_path / "empty", rows=100)


@pytest.mark.parametrize("settings, message", [({"rows": 5}, "rows is too small"), ({"zipf": 1}, "zipf=1 must be")])
def test_impossible_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        synthetic.prepare(tmp_path / "a", **settings)
