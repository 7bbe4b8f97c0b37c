"""KuaiRand features: nothing that a row may not know is in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from msn_dist.data import kuairand
from msn_dist.data.kuairand import Features, Raw, Scale
from msn_dist.data.parquet import ParquetReader
from msn_dist.data.schema import load_schema
from msn_dist.errors import InputError

SOURCE = Path(__file__).parent.parent / "data" / "kuairand"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("kuairand") / "prepared"
    kuairand.prepare(SOURCE, target)
    return target


@pytest.fixture(scope="module")
def few_users() -> dict[str, pa.Table]:
    tables = {name: pq.read_table(SOURCE / f"{name}.parquet") for name in ("train", "valid", "test", "users", "videos")}
    return {
        name: table.filter(pc.less(table["user_id"], 300)) if name in ("train", "valid", "test") else table
        for name, table in tables.items()
    }


def columns_of(tables: dict[str, pa.Table], labels: np.ndarray) -> dict[str, pa.Table]:
    """Feature columns of train and test with the given training labels, scaled as with the true ones."""
    train = tables["train"]
    at = train.column_names.index("long_view")
    raw = Raw(**{**tables, "train": train.set_column(at, "long_view", pa.array(labels, pa.int8()))})
    scale = Scale(Features(Raw(**tables), "train").statistics)
    return {split: Features(raw, split).columns(scale).drop_columns(["long_view"]) for split in ("train", "test")}


def changed_rows(before: pa.Table, after: pa.Table, columns: list[str]) -> set[int]:
    """Rows that differ in any of the columns."""
    before, after = before.select(columns).to_pylist(), after.select(columns).to_pylist()
    return {row for row, (old, new) in enumerate(zip(before, after, strict=True)) if old != new}


def test_every_row_is_read_back(prepared):
    schema = load_schema(prepared)
    for split, rows in (("train", 817_187), ("valid", 91_805), ("test", 88_219)):
        reader = ParquetReader(prepared / split, schema, 8192)
        assert sum(len(batch) for batch in reader) == reader.num_rows == rows


def test_a_second_prepare_writes_nothing(prepared):
    before = (prepared / "schema.yaml").stat().st_mtime_ns
    kuairand.prepare(SOURCE, prepared)
    assert (prepared / "schema.yaml").stat().st_mtime_ns == before


def test_no_column_that_only_some_splits_have_or_that_is_an_outcome_is_used(prepared):
    tables = [pq.read_schema(next((prepared / split).iterdir())) for split in ("train", "valid", "test")]
    assert tables[0].equals(tables[1]) and tables[1].equals(tables[2])
    assert not {"hour", "tab", "date", "is_click", "is_like", "finish", "seq_pos"} & set(tables[0].names)


def test_users_without_training_rows_are_groups_of_their_own(prepared):
    groups = set(pq.read_table(prepared / "test", columns=["group_user"])["group_user"].to_pylist())
    seen = set(pq.read_table(SOURCE / "train.parquet", columns=["user_id"])["user_id"].to_pylist())
    assert len(groups - seen) > 100


def test_histories_are_the_users_own_past_newest_first(few_users):
    columns = columns_of(few_users, few_users["train"]["long_view"].to_numpy())
    train, test = few_users["train"].to_pylist(), few_users["test"].to_pylist()
    for split, rows in (("train", train), ("test", test)):
        for name, label in (("positive", 1), ("negative", 0)):
            histories = columns[split][f"{name}_video_id"].to_pylist()
            for row in range(0, len(rows), 37):
                past = [
                    event["video_id"]
                    for event in train
                    if event["user_id"] == rows[row]["user_id"]
                    and event["long_view"] == label
                    and (split == "test" or event["seq_pos"] < rows[row]["seq_pos"])
                ]
                assert histories[row] == past[::-1][: kuairand.HISTORY_LENGTH]


@pytest.mark.parametrize("row", [0, 25, 700, 4000])
def test_a_label_changes_only_later_rows_of_its_user_and_other_folds(few_users, row):
    labels = few_users["train"]["long_view"].to_numpy()
    flipped = labels.copy()
    flipped[row] ^= 1
    before, after = columns_of(few_users, labels), columns_of(few_users, flipped)
    names = before["train"].column_names
    from_folds = [name for name in names if name.startswith("fold_")]
    own_past = [name for name in names if not name.startswith("fold_")]

    users = few_users["train"]["user_id"].to_numpy()
    later = {r for r in np.flatnonzero(users == users[row]).tolist() if r > row}
    assert changed_rows(before["train"], after["train"], own_past) == later

    folds = Raw(**few_users).folds_U
    for split in ("train", "test"):
        touched = changed_rows(before[split], after[split], from_folds)
        row_folds = folds[few_users[split]["user_id"].to_numpy()[sorted(touched)]]
        assert touched and folds[users[row]] not in row_folds


def test_a_missing_source_file_is_named(tmp_path):
    with pytest.raises(InputError, match="train.parquet: there is no such file"):
        kuairand.prepare(tmp_path, tmp_path / "out")
