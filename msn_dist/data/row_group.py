"""One Parquet row group -> a checked Table. Whatever is wrong with a file is said here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from msn_dist.data.schema import Schema
from msn_dist.data.table import Lists, Table, ragged_index
from msn_dist.errors import InputError


@dataclass(frozen=True)
class RowGroup:
    """The unit that is read, shuffled and dealt to ranks."""

    path: Path
    index: int
    rows: int

    def __str__(self) -> str:
        return f"{self.path}, row group {self.index}"


@contextmanager
def readable(place: Path | RowGroup) -> Iterator[None]:
    """Turns what pyarrow raises about a bad file into an InputError that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError) as error:
        raise InputError(
            f"{place}: cannot be read as Parquet, truncated or corrupt ({str(error).splitlines()[0]}). "
            "Copy or prepare the file again"
        ) from None


def open_file(path: Path, schema: Schema) -> pq.FileMetaData:
    """The footer of a file, after checking that it has every column of the schema in a usable type."""
    with readable(path):
        footer = pq.read_metadata(path)
    fields = footer.schema.to_arrow_schema()
    for column, (usable, wanted) in _column_types(schema).items():
        if column not in fields.names:
            raise InputError(
                f"{path}: column {column!r} of schema.yaml is missing; the file has {fields.names}. "
                "Prepare the data again or correct schema.yaml"
            )
        if not usable(fields.field(column).type):
            raise InputError(
                f"{path}: column {column!r} is {fields.field(column).type}, but must be {wanted}. "
                "Prepare the data again or correct schema.yaml"
            )
    return footer


def read_row_group(unit: RowGroup, footer: pq.FileMetaData, schema: Schema) -> Table:
    """Read one row group and check every value; InputError names the file, row group, column, row and value."""
    columns = list(_column_types(schema))
    with readable(unit), pq.ParquetFile(unit.path, metadata=footer, page_checksum_verification=True) as file:
        arrow = file.read_row_group(unit.index, columns=columns, use_threads=False)
    return _Converter(unit, schema, arrow.combine_chunks()).table()


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_id_list(kind: pa.DataType) -> bool:
    return _is_list(kind) and pa.types.is_integer(kind.value_type)


def _is_id(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or _is_id_list(kind)


def _column_types(schema: Schema) -> dict:
    """Column -> (test of its Arrow type, words for it), every column that the schema reads."""
    types = {column: (_is_id, "an integer or a list of integers") for column in schema.ids}
    for history in schema.histories.values():
        types.update({column: (_is_id_list, "a list of integers") for column in history.columns})
    types.update({column: (_is_number, "a number") for column in [*schema.dense, *schema.labels]})
    # The group may be an id column too, and must then satisfy both: an integer does.
    types[schema.group] = (pa.types.is_integer, "an integer")
    return types


class _Converter:
    """Arrow columns of one row group -> numpy, checked."""

    def __init__(self, unit: RowGroup, schema: Schema, arrow: pa.Table) -> None:
        self.unit, self.schema, self.arrow = unit, schema, arrow

    def table(self) -> Table:
        schema, ids, lists = self.schema, {}, []
        for column in schema.ids:
            if _is_list(self.arrow.schema.field(column).type):
                lists.append(self._lists([column], None))
            else:
                ids[column] = self._checked_ids(column, self._integers(column), None)
        for history in schema.histories.values():
            lists.append(self._lists(list(history.columns), history.max_length))
        return Table(
            ids,
            lists,
            self._matrix(schema.dense, self._dense),
            self._matrix(schema.labels, self._label),
            self._integers(schema.group).astype(np.int64),
        )

    def _column(self, column: str) -> pa.Array:
        chunked = self.arrow.column(column)
        return chunked.chunk(0) if chunked.num_chunks == 1 else pa.concat_arrays(chunked.chunks)

    def _fail(self, column: str, row: int, problem: str) -> NoReturn:
        raise InputError(f"{self.unit}, column {column!r}, row {row}: {problem}")

    def _integers(self, column: str) -> np.ndarray:
        array = self._column(column)
        if array.null_count:
            self._fail(column, _first(array.is_null()), "is null, but an id is needed; give missing values an id")
        return array.to_numpy()

    def _checked_ids(self, column: str, ids: np.ndarray, lengths_R: np.ndarray | None) -> np.ndarray:
        name = self.schema.table_of(column)
        rows = self.schema.tables[name]
        if len(ids) and (ids.min() < 0 or ids.max() >= rows):
            at = int(np.argmax((ids < 0) | (ids >= rows)))
            row = at if lengths_R is None else int(np.searchsorted(np.cumsum(lengths_R), at, side="right"))
            fix = f"enlarge tables.{name} in schema.yaml or correct the data"
            self._fail(column, row, f"id {ids[at]} is not in [0, {rows}) of table {name!r}; {fix}")
        return ids

    def _lists(self, columns: list[str], max_length: int | None) -> Lists:
        lengths_R, values = None, {}
        for column in columns:
            array = self._column(column)
            if array.null_count:
                self._fail(column, _first(array.is_null()), "the list is null; write an empty list")
            own_R = np.diff(array.offsets.to_numpy()).astype(np.int64)
            lengths_R = own_R if lengths_R is None else lengths_R
            if not np.array_equal(own_R, lengths_R):
                row = int(np.argmax(own_R != lengths_R))
                self._fail(
                    column,
                    row,
                    f"has {own_R[row]} events, but {columns[0]!r} of the same history has {lengths_R[row]}; "
                    "columns of a history are parallel lists",
                )
            ids = array.flatten()
            if ids.null_count:
                at = _first(ids.is_null())
                self._fail(column, int(np.searchsorted(np.cumsum(own_R), at, side="right")), "holds a null id; drop it")
            values[column] = self._checked_ids(column, ids.to_numpy(), own_R)
        if max_length is not None and len(lengths_R) and lengths_R.max() > max_length:
            kept_R = np.minimum(lengths_R, max_length)
            index = ragged_index(np.cumsum(lengths_R) - lengths_R, kept_R)
            lengths_R, values = kept_R, {column: ids[index] for column, ids in values.items()}
        return Lists(lengths_R, values)

    def _matrix(self, columns: list[str], convert) -> np.ndarray:
        matrix = np.empty((self.unit.rows, len(columns)), dtype=np.float32)
        for i, column in enumerate(columns):
            matrix[:, i] = convert(column, _as_floats(self._column(column)))
        return matrix

    def _dense(self, column: str, values: np.ndarray) -> np.ndarray:
        if not np.isfinite(values).all():
            row = int(np.argmin(np.isfinite(values)))
            self._fail(column, row, f"dense value {values[row]} (null counts as nan); write a finite number")
        return values

    def _label(self, column: str, values: np.ndarray) -> np.ndarray:
        bad = (values < 0) | (values > 1) | np.isinf(values)
        if bad.any():
            row = int(np.argmax(bad))
            self._fail(column, row, f"label {values[row]:g} is not in [0, 1]; null means that a row has no label")
        return values


def _as_floats(array: pa.Array) -> np.ndarray:
    """float32 with NaN for null."""
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.int8())
    return array.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)


def _first(mask: pa.Array) -> int:
    return int(np.argmax(mask.to_numpy(zero_copy_only=False)))
