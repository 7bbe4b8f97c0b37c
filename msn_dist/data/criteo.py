"""Criteo click logs (TSV: label, 13 integers, 26 hexadecimal categories) -> the folder format, as a stream.

Integers become dense: signed log, 0 where missing, and a column that says so. Categories become ids: 0 is
missing; others are hashed, or looked up in a vocabulary of the values seen at least `min_count` times in
the training rows, with 1 for all others. Lines are in time order and are split in that order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from msn_dist.data.folder import SPLITS, SplitWriter, fingerprint, is_current, new_folder, write_schema
from msn_dist.data.schema import Schema
from msn_dist.errors import InputError

INTEGERS = [f"I{i}" for i in range(1, 14)]
CATEGORIES = [f"C{i}" for i in range(1, 27)]
_COLUMNS = ["label", *INTEGERS, *CATEGORIES]
_FIX = "correct or remove the line"
_BLOCK_BYTES = 8 << 20


def prepare(
    sources: str | Path | Sequence[str | Path],
    target: str | Path,
    *,
    hash_rows: int = 100_000,
    min_count: int | None = None,
    valid_fraction: float = 0.1,
    test_fraction: float = 0.1,
) -> None:
    """Write `target` from TSV files given in time order; at once if it is up to date.

    Args:
        hash_rows: rows of every category's table, with hashing.
        min_count: if given, vocabularies instead of hashing; takes one more pass.
        valid_fraction: share of the lines, after the training lines.
        test_fraction: share of the lines, at the end.
    """
    files = [Path(sources)] if isinstance(sources, (str, Path)) else [Path(path) for path in sources]
    if hash_rows < 2:
        raise InputError(f"criteo hash_rows={hash_rows} must be at least 2: row 0 is for missing values")
    if valid_fraction < 0 or test_fraction < 0 or valid_fraction + test_fraction >= 1:
        raise InputError(f"criteo fractions {valid_fraction} (valid) + {test_fraction} (test) must leave training rows")
    for path in files:
        if not path.is_file():
            raise InputError(f"{path}: there is no such file; give the Criteo TSV file, unpacked")
    settings = {"hash_rows": hash_rows, "min_count": min_count, "fractions": (valid_fraction, test_fraction)}
    target = Path(target)
    stamp = fingerprint([sys.modules[__name__]], files, **settings)
    if is_current(target, stamp):
        return
    total = sum(_count_lines(path) for path in files)
    ends = [round(total * (1 - valid_fraction - test_fraction)), round(total * (1 - test_fraction)), total]
    if min_count is None:
        encode = {column: _Hashed(seed, hash_rows) for seed, column in enumerate(CATEGORIES)}
    else:
        encode = _vocabularies(files, ends[0], min_count)
    with new_folder(target, stamp) as folder, ExitStack() as stack:
        write_schema(folder, _schema(encode))
        writers = [stack.enter_context(SplitWriter(folder / split)) for split in SPLITS]
        for first, block in _blocks(files):
            table = _convert(block, encode)
            for writer, start, end in zip(writers, [0, *ends[:2]], ends, strict=True):
                low, high = max(start - first, 0), min(end - first, table.num_rows)
                if low < high:
                    writer.write(table.slice(low, high - low))


def _schema(encode: dict[str, _Hashed | _Vocabulary]) -> Schema:
    return Schema(
        name="criteo",
        tables={column: encoder.rows for column, encoder in encode.items()},
        ids={column: column for column in CATEGORIES},
        dense=[*INTEGERS, *(f"{column}_missing" for column in INTEGERS)],
        labels=["label"],
        group="group",  # Criteo names no users: all rows are one group
    )


class _Hashed:
    """Codes -> [1, rows), spread by a multiplier of each column's own."""

    def __init__(self, column: int, rows: int) -> None:
        self.rows = rows
        self._factor = np.uint64(0x9E3779B97F4A7C15 + 2 * column)

    def __call__(self, codes: np.ndarray) -> np.ndarray:
        return 1 + ((codes.astype(np.uint64) * self._factor) >> np.uint64(32)).astype(np.int64) % (self.rows - 1)


class _Vocabulary:
    """Known codes -> 2, 3, ...; all others -> 1."""

    def __init__(self, known: np.ndarray) -> None:
        self.rows, self._known = len(known) + 2, known

    def __call__(self, codes: np.ndarray) -> np.ndarray:
        if not len(self._known):
            return np.ones(len(codes), dtype=np.int64)
        place = np.minimum(np.searchsorted(self._known, codes), len(self._known) - 1)
        return np.where(self._known[place] == codes, place + 2, 1)


def _vocabularies(files: list[Path], train_rows: int, min_count: int) -> dict[str, _Vocabulary]:
    seen = {column: (np.empty(0, np.int64), np.empty(0, np.int64)) for column in CATEGORIES}
    for first, block in _blocks(files):
        if first >= train_rows:
            break
        for column, (codes, counts) in seen.items():
            present, new = block.category(column)
            new = new[: np.count_nonzero(present[: train_rows - first])]
            merged, inverse = np.unique(np.concatenate([codes, new]), return_inverse=True)
            weights = np.concatenate([counts, np.ones(len(new))])
            seen[column] = (merged, np.bincount(inverse, weights, len(merged)).astype(np.int64))
    return {column: _Vocabulary(codes[counts >= min_count]) for column, (codes, counts) in seen.items()}


def _convert(block: _Block, encode: dict[str, _Hashed | _Vocabulary]) -> pa.Table:
    columns = {"label": block.label()}
    for column in INTEGERS:
        values_R, missing_R = block.integer(column)
        columns[column] = (np.sign(values_R) * np.log1p(np.abs(values_R))).astype(np.float32)
        columns[f"{column}_missing"] = missing_R.astype(np.float32)
    for column, encoder in encode.items():
        present_R, codes = block.category(column)
        ids_R = np.zeros(len(present_R), dtype=np.int32)
        ids_R[present_R] = encoder(codes)
        columns[column] = ids_R
    return pa.table(columns | {"group": np.zeros(block.table.num_rows, dtype=np.int64)})


@dataclass(frozen=True)
class _Block:
    """Consecutive lines of a file as text columns; a bad field is an InputError with its line. Shape suffix R rows."""

    path: Path
    first_line: int
    table: pa.RecordBatch

    def label(self) -> np.ndarray:
        text = self.table["label"]
        self._require(pc.is_in(text, pa.array(["0", "1"])), "label", "0 or 1")
        return pc.cast(text, pa.float32()).to_numpy()

    def integer(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """(values, 0 where missing; whether missing)."""
        text = self.table[column]
        self._require(pc.match_substring_regex(text, r"^(-?[0-9]{1,18})?$"), column, "an integer or empty")
        values = pc.cast(pc.if_else(pc.equal(text, ""), None, text), pa.int64())
        return pc.fill_null(values, 0).to_numpy(), values.is_null().to_numpy(zero_copy_only=False)

    def category(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """(whether a row has a value; the values as integers, of the rows that have one)."""
        text = self.table[column]
        present_R = pc.not_equal(text, "").to_numpy(zero_copy_only=False)
        self._require(pc.match_substring_regex(text, r"^([0-9a-f]{8})?$"), column, "8 hexadecimal digits or empty")
        _, offsets, data = text.buffers()
        ends = np.frombuffer(offsets, np.int32)[[text.offset, text.offset + len(text)]]
        digits = np.frombuffer(data or b"", np.uint8)[slice(*ends)].reshape(-1, 8).astype(np.int64)
        digits = np.where(digits >= ord("a"), digits - ord("a") + 10, digits - ord("0"))
        return present_R, digits @ (16 ** np.arange(7, -1, -1))

    def _require(self, good: pa.Array, column: str, wanted: str) -> None:
        good_R = good.to_numpy(zero_copy_only=False)
        if not good_R.all():
            row = int(np.argmin(good_R))
            value = self.table[column][row].as_py()
            raise InputError(f"{self.path}, line {self.first_line + row}: {column} is {value!r}, not {wanted}; {_FIX}")


def _blocks(files: list[Path]) -> Iterator[tuple[int, _Block]]:
    """(number of rows before, block) over all files."""
    before = 0
    for path in files:
        line = 1
        for batch in _batches(path):
            yield before, _Block(path, line, batch)
            line, before = line + batch.num_rows, before + batch.num_rows


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Batches of text columns; a line with another number of columns is an InputError."""
    malformed: list[csv.InvalidRow] = []

    def remember(row: csv.InvalidRow) -> str:
        malformed.append(row)
        return "error"

    try:
        yield from csv.open_csv(
            path,
            read_options=csv.ReadOptions(column_names=_COLUMNS, use_threads=False, block_size=_BLOCK_BYTES),
            parse_options=csv.ParseOptions(
                delimiter="\t", quote_char=False, ignore_empty_lines=False, invalid_row_handler=remember
            ),
            convert_options=csv.ConvertOptions(column_types=dict.fromkeys(_COLUMNS, pa.string())),
        )
    except pa.ArrowInvalid as error:
        if not malformed:
            raise InputError(f"{path}: cannot be read as tab-separated text ({error}); correct the file") from None
        row = malformed[0]
        raise InputError(
            f"{path}, line {row.number}: has {row.actual_columns} columns, not {row.expected_columns} "
            f"separated by tabs; {_FIX}"
        ) from None


def _count_lines(path: Path) -> int:
    with open(path, "rb") as file:
        lines, last = 0, b"\n"
        while chunk := file.read(_BLOCK_BYTES):
            lines, last = lines + chunk.count(b"\n"), chunk[-1:]
    return lines + (last != b"\n")
