"""Criteo TSV -> the folder format: values, splits, vocabularies, and one error for each kind of bad line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from msn_dist.data import criteo
from msn_dist.data.parquet import ParquetReader
from msn_dist.data.schema import load_schema
from msn_dist.errors import InputError


def line(number: int) -> str:
    integers = ["" if number % 4 == 0 else str(number - 3), *["7"] * 12]
    categories = ["" if number % 5 == 0 else f"{number % 3:08x}", f"{number:08x}", *["0a1b2c3d"] * 24]
    return "\t".join([str(number % 2), *integers, *categories])


def write_lines(path: Path, numbers: range) -> Path:
    path.write_text("".join(f"{line(number)}\n" for number in numbers))
    return path


def test_lines_become_rows_in_time_order(tmp_path, monkeypatch):
    monkeypatch.setattr(criteo, "_BLOCK_BYTES", 5_000)  # many blocks, so that splits and files cross them
    sources = [write_lines(tmp_path / "day0", range(300)), write_lines(tmp_path / "day1", range(300, 1000))]
    criteo.prepare(sources, tmp_path / "out", hash_rows=50)
    split = {name: pq.read_table(tmp_path / "out" / name) for name in ("train", "valid", "test")}
    assert {name: table.num_rows for name, table in split.items()} == {"train": 800, "valid": 100, "test": 100}
    for name, first in (("train", 0), ("valid", 800), ("test", 900)):
        number = first + np.arange(split[name].num_rows)
        missing = number % 4 == 0
        value = np.where(missing, 0, number - 3)
        column = {key: split[name][key].to_numpy() for key in ("label", "I1", "I1_missing", "C1", "C2", "C3")}
        np.testing.assert_array_equal(column["label"], number % 2)
        np.testing.assert_allclose(column["I1"], np.sign(value) * np.log1p(np.abs(value)), rtol=1e-6)
        np.testing.assert_array_equal(column["I1_missing"], missing)
        np.testing.assert_array_equal(column["C1"] == 0, number % 5 == 0)
        assert len(set(column["C1"].tolist())) == 4 and len(set(column["C3"].tolist())) == 1
        assert 30 < len(set(column["C2"].tolist())) < 50
    reader = ParquetReader(tmp_path / "out" / "train", load_schema(tmp_path / "out"), 256)
    assert sum(len(batch) for batch in reader) == 800


def test_vocabulary_holds_what_the_training_rows_have_often_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(criteo, "_BLOCK_BYTES", 5_000)
    source = write_lines(tmp_path / "day", range(100))
    criteo.prepare(source, tmp_path / "out", min_count=20, valid_fraction=0.0, test_fraction=0.5)
    schema = load_schema(tmp_path / "out")
    # Of 50 training rows, 0, 1 and 2 of C1 have 13, 14 and 13; C2 has each value once; C3 one value.
    assert (schema.tables["C1"], schema.tables["C2"], schema.tables["C3"]) == (2, 2, 3)
    criteo.prepare(source, tmp_path / "out", min_count=14, valid_fraction=0.0, test_fraction=0.5)
    number = np.arange(50, 100)
    table = pq.read_table(tmp_path / "out" / "test")
    wanted = np.where(number % 5 == 0, 0, np.where(number % 3 == 1, 2, 1))
    np.testing.assert_array_equal(table["C1"].to_numpy(), wanted)
    assert set(table["C2"].to_pylist()) == {1} and set(table["C3"].to_pylist()) == {2}


BAD_LINES = {
    "has 3 columns, not 40": "1\t2\t3",
    "label is '', not 0 or 1": "",
    "label is '2', not 0 or 1": "2" + line(41)[1:],
    "I1 is '3.5', not an integer or empty": line(41).replace("\t38\t", "\t3.5\t", 1),
    "C2 is '0000002', not 8 hexadecimal digits or empty": line(41).replace("00000029", "0000002"),
    "C26 is '0a1b2c3g', not 8 hexadecimal digits or empty": line(41)[:-1] + "g",
}


@pytest.mark.parametrize("message", BAD_LINES)
def test_a_bad_line_is_named_and_nothing_is_left_behind(tmp_path, monkeypatch, message):
    monkeypatch.setattr(criteo, "_BLOCK_BYTES", 5_000)
    lines = [line(number) for number in range(100)]
    lines[41] = BAD_LINES[message]
    (tmp_path / "day").write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=f"day, line 42: {message}.*; correct or remove the line"):
        criteo.prepare(tmp_path / "day", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["day"]


def test_a_missing_file_and_impossible_settings_are_refused(tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        criteo.prepare(tmp_path / "day", tmp_path / "out")
    source = write_lines(tmp_path / "day", range(10))
    with pytest.raises(InputError, match="must leave training rows"):
        criteo.prepare(source, tmp_path / "out", valid_fraction=0.5, test_fraction=0.5)
    with pytest.raises(InputError, match="hash_rows=1"):
        criteo.prepare(source, tmp_path / "out", hash_rows=1)
