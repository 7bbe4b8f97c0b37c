"""The Parquet reader: every row exactly once, a shuffle that can be repeated, resuming, and one error for bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msn_dist.data.lengths import mean_lengths
from msn_dist.data.parquet import ParquetReader
from msn_dist.data.schema import History, Schema
from msn_dist.errors import InputError

SCHEMA = Schema(
    name="small",
    tables={"item": 1000, "colour": 7},
    ids={"item": "item", "colour": "colour", "bag": "colour"},
    histories={"seen": History(max_length=3, columns={"seen_item": "item", "seen_colour": "colour"})},
    dense=["price"],
    labels=["click", "like"],
    group="user",
)


def rows_table(start: int, rows: int) -> pa.Table:
    """Rows start, start + 1, ...; every column can be computed from the row's number, which is `user`."""
    number = np.arange(start, start + rows)
    return pa.table(
        {
            "item": pa.array(number % 1000, pa.int32()),
            "colour": pa.array(number % 7, pa.int64()),
            "bag": pa.array([[n % 7] * (n % 3) for n in number], pa.list_(pa.int32())),
            "seen_item": pa.array([[(n + j) % 1000 for j in range(n % 6)] for n in number], pa.list_(pa.int32())),
            "seen_colour": pa.array([[(n + j) % 7 for j in range(n % 6)] for n in number], pa.list_(pa.int32())),
            "price": pa.array(number * 0.5, pa.float64()),
            "click": pa.array(number % 2, pa.int8()),
            "like": pa.array([None if n % 5 == 0 else n % 2 for n in number], pa.float32()),
            "user": pa.array(number, pa.int64()),
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """317 rows in 4 files and 12 row groups of uneven sizes."""
    folder = tmp_path_factory.mktemp("split")
    start = 0
    for part, (rows, group) in enumerate([(100, 33), (7, 7), (130, 31), (80, 40)]):
        pq.write_table(rows_table(start, rows), folder / f"part-{part}.parquet", row_group_size=group)
        start += rows
    return folder


def users(reader: ParquetReader) -> list[int]:
    return [user for batch in reader for user in batch.groups_B.tolist()]


def test_batch_holds_the_columns_of_each_row_and_the_newest_events(folder):
    for batch in ParquetReader(folder, SCHEMA, 50, shuffle=True, shuffle_buffer=64):
        number = batch.groups_B.numpy()
        assert batch.sparse.keys() == SCHEMA.sparse_keys and batch.sparse.stride() == len(batch)
        lists = {key: [part.tolist() for part in batch.sparse[key].to_dense()] for key in SCHEMA.sparse_keys}
        assert lists["item"] == [[n % 1000] for n in number]
        assert lists["bag"] == [[n % 7] * (n % 3) for n in number]
        assert lists["seen_item"] == [[(n + j) % 1000 for j in range(min(n % 6, 3))] for n in number]
        assert lists["seen_colour"] == [[(n + j) % 7 for j in range(min(n % 6, 3))] for n in number]
        assert batch.dense_BF[:, 0].tolist() == (number * 0.5).tolist()
        assert batch.labels_BK[:, 0].tolist() == (number % 2).tolist()
        np.testing.assert_array_equal(batch.labels_BK[:, 1], np.where(number % 5 == 0, np.nan, number % 2))


def test_mean_lengths_are_those_of_the_lists_as_they_are_read(folder, tmp_path):
    lists = [[n % of for n in range(100)] for of in (3, 6, 6)]
    of_lists = dict(zip(("bag", "seen_item", "seen_colour"), (sum(lengths) / 100 for lengths in lists), strict=True))
    assert mean_lengths(folder, SCHEMA) == of_lists
    seen = SCHEMA.histories["seen"].model_copy(update={"max_length": 2})
    shorter = SCHEMA.model_copy(update={"histories": {"seen": seen}})
    assert mean_lengths(folder, shorter) == of_lists | {"seen_item": 2, "seen_colour": 2}
    assert mean_lengths(tmp_path, SCHEMA) == {}
    pq.write_table(rows_table(0, 0), tmp_path / "a.parquet")
    assert mean_lengths(tmp_path, SCHEMA) == {}
    columns = [name for name in rows_table(0, 1).column_names if name != "bag"]
    pq.write_table(rows_table(0, 100), tmp_path / "a.parquet", write_statistics=columns)  # names of flat columns
    assert "bag" not in mean_lengths(tmp_path, SCHEMA)


def test_mean_lengths_are_of_a_column_by_its_whole_name(tmp_path):
    """Columns may have dots, and other columns of the file such names too."""
    schema = Schema(
        name="dots", tables={"item": 9}, ids={"item": "item", "a.b": "item"}, labels=["click"], group="item"
    )
    lists = pa.array([[1, 2, 3]] * 4, pa.list_(pa.int32()))
    columns = {"item": pa.array([1] * 4), "item.tags": lists, "a.b": lists, "click": pa.array([1] * 4)}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert mean_lengths(tmp_path, schema) == {"a.b": 3}


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_row_once_over_the_ranks_in_each_epoch(folder, world_size, shuffle):
    readers = [
        ParquetReader(folder, SCHEMA, 16, rank=rank, world_size=world_size, shuffle=shuffle, shuffle_buffer=40)
        for rank in range(world_size)
    ]
    for epoch in range(2):
        for reader in readers:
            reader.set_epoch(epoch)
        batches = [[batch.groups_B.tolist() for batch in reader] for reader in readers]
        assert [len(share) for share in batches] == [reader.num_batches for reader in readers]
        shares = [sum(share, []) for share in batches]
        assert sorted(sum(shares, [])) == list(range(317)) and readers[0].num_rows == 317
        if world_size <= 5:
            assert max(map(len, shares)) - min(map(len, shares)) <= 40  # one row group


def test_every_row_once_over_reader_workers_and_resuming_with_them(folder):
    readers = [
        ParquetReader(folder, SCHEMA, 16, rank=rank, world_size=2, shuffle=True, shuffle_buffer=40, workers=2)
        for rank in range(2)
    ]
    batches = [[batch.groups_B.tolist() for batch in reader] for reader in readers]
    assert sorted(user for rank in batches for batch in rank for user in batch) == list(range(317))
    assert [len(rank) for rank in batches] == [reader.num_batches for reader in readers]
    state = readers[0].state_dict(batches=4)
    readers[0].load_state_dict(state)
    assert [batch.groups_B.tolist() for batch in readers[0]] == batches[0][4:]


def test_order_is_the_files_order_without_shuffle_and_differs_by_seed_and_epoch_with_it(folder):
    def order(seed: int, epoch: int) -> list[int]:
        reader = ParquetReader(folder, SCHEMA, 16, seed=seed, shuffle=True, shuffle_buffer=100)
        reader.set_epoch(epoch)
        return users(reader)

    assert users(ParquetReader(folder, SCHEMA, 16)) == list(range(317))
    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_only_the_last_batch_is_short(folder):
    for buffer in (1, 50, 10_000):
        sizes = [len(batch) for batch in ParquetReader(folder, SCHEMA, 64, shuffle=True, shuffle_buffer=buffer)]
        assert sizes == [64, 64, 64, 64, 61]


def test_resumes_after_the_batches_that_were_yielded(folder):
    def reader() -> ParquetReader:
        return ParquetReader(folder, SCHEMA, 16, shuffle=True, shuffle_buffer=64)

    first = reader()
    first.set_epoch(3)
    batches = [batch.groups_B.tolist() for batch in first]
    iterator = iter(first)
    for _ in range(5):
        next(iterator)
    second = reader()
    second.load_state_dict(first.state_dict())
    second.set_epoch(3)
    assert [batch.groups_B.tolist() for batch in second] == batches[5:]
    assert second.state_dict()["batches"] == len(batches)
    assert [batch.groups_B.tolist() for batch in second] == batches  # the next iteration is a whole epoch again


def test_resuming_inside_an_epoch_refuses_another_reader_but_between_epochs_takes_it(folder):
    first = ParquetReader(folder, SCHEMA, 16)
    other = ParquetReader(folder, SCHEMA, 32)
    next(iter(first))
    with pytest.raises(InputError, match="batch_size was 16 and is 32"):
        other.load_state_dict(first.state_dict())
    other.load_state_dict(first.state_dict(batches=0))
    assert users(other) == list(range(317))


def with_column(column: str, values: pa.Array) -> pa.Table:
    table = rows_table(0, 6)
    return table.set_column(table.column_names.index(column), column, values)


BAD_FOOTERS = {
    "column 'price' of schema.yaml is missing": rows_table(0, 6).drop_columns(["price"]),
    "column 'item' is double, but must be an integer or a list of integers": with_column("item", pa.array([0.5] * 6)),
    "column 'seen_item' is int64, but must be a list of integers": with_column("seen_item", pa.array([1] * 6)),
    "column 'click' is string, but must be a number": with_column("click", pa.array(["1"] * 6)),
    "column 'user' is float, but must be an integer": with_column("user", pa.array([1.0] * 6, pa.float32())),
}


@pytest.mark.parametrize("message", BAD_FOOTERS)
def test_a_file_that_does_not_fit_the_schema_is_refused_before_reading(tmp_path, message):
    pq.write_table(rows_table(0, 6), tmp_path / "a.parquet")
    pq.write_table(BAD_FOOTERS[message], tmp_path / "b.parquet")
    with pytest.raises(InputError, match=f"b.parquet: {message}"):
        ParquetReader(tmp_path, SCHEMA, 4)


BAD_VALUES = {
    "column 'item', row 2: is null": with_column("item", pa.array([1, 2, None, 4, 5, 6])),
    "column 'user', row 5: is null": with_column("user", pa.array([1, 2, 3, 4, 5, None])),
    r"column 'item', row 1: id 1000 is not in \[0, 1000\) of table 'item'": with_column(
        "item", pa.array([1, 1000, 3, 4, 5, 6])
    ),
    "column 'colour', row 3: id -1 is not in": with_column("colour", pa.array([0, 0, 0, -1, 0, 0], pa.int8())),
    "column 'seen_colour', row 3: id 7 is not in": with_column(
        "seen_colour", pa.array([[], [1], [1, 2], [1, 2, 7], [1] * 4, [1] * 5])
    ),
    "column 'seen_colour', row 2: has 3 events, but 'seen_item' of the same history has 2": with_column(
        "seen_colour", pa.array([[], [1], [1, 2, 3], [1, 2, 3], [1] * 4, [1] * 5])
    ),
    "column 'bag', row 4: holds a null id": with_column("bag", pa.array([[], [1], [1, 1], [], [None], []])),
    "column 'bag', row 0: the list is null": with_column("bag", pa.array([None, [1], [1, 1], [], [1], []])),
    "column 'price', row 1: dense value nan": with_column("price", pa.array([0.5, None, 1, 1, 1, 1])),
    "column 'click', row 4: label 2 is not in": with_column("click", pa.array([0, 1, 0, 1, 2, 0])),
}


def write_bad(path: Path, message: str) -> None:
    """A good row group, then a bad one."""
    bad = BAD_VALUES[message]
    with pq.ParquetWriter(path, bad.schema) as writer:
        writer.write_table(rows_table(0, 6).cast(bad.schema))
        writer.write_table(bad)


@pytest.mark.parametrize("message", BAD_VALUES)
def test_a_bad_value_is_named_with_its_file_row_group_column_and_row(tmp_path, message):
    write_bad(tmp_path / "a.parquet", message)
    with pytest.raises(InputError, match=f"a.parquet, row group 1, {message}"):
        users(ParquetReader(tmp_path, SCHEMA, 4))


def test_an_error_in_a_reader_worker_keeps_its_message(tmp_path):
    message = "column 'item', row 2: is null"
    write_bad(tmp_path / "a.parquet", message)
    with pytest.raises(InputError, match=f"^[^\n]*a.parquet, row group 1, {message}[^\n]*$"):
        users(ParquetReader(tmp_path, SCHEMA, 4, workers=1))


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(rows_table(0, 600), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="a.parquet: cannot be read as Parquet, truncated or corrupt"):
        ParquetReader(tmp_path, SCHEMA, 4)


def test_a_corrupt_page_is_named_with_its_row_group(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(rows_table(0, 600), path, row_group_size=300, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    page = pq.read_metadata(path).row_group(1).column(8).data_page_offset
    content[page + 200] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InputError, match="a.parquet, row group 1: cannot be read as Parquet"):
        users(ParquetReader(tmp_path, SCHEMA, 4))


def test_a_missing_or_empty_split_is_named(tmp_path):
    with pytest.raises(InputError, match="train: there is no such folder; prepare the data first"):
        ParquetReader(tmp_path / "train", SCHEMA, 4)
    with pytest.raises(InputError, match=r"holds no \*.parquet file"):
        ParquetReader(tmp_path, SCHEMA, 4)
    pq.write_table(rows_table(0, 0), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="the split has no rows"):
        ParquetReader(tmp_path, SCHEMA, 4)
