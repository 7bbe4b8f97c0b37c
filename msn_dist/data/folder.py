"""Writing the folder format that every `prepare` shares: schema.yaml and train/, valid/, test/ of Parquet parts."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from msn_dist.config import dump_config
from msn_dist.data.schema import Schema
from msn_dist.errors import InputError

SPLITS = ("train", "valid", "test")
ROW_GROUP = 8_192
_PART_ROWS = 128 * ROW_GROUP
_STAMP = "stamp"


def fingerprint(modules: list[ModuleType], files: list[Path] = (), **settings: object) -> str:
    """Changes whenever the code that prepares, an input file or a setting changes."""
    digest = hashlib.sha256(repr(sorted(settings.items())).encode())
    for path in [Path(__file__), *(Path(module.__file__) for module in modules), *files]:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def is_current(target: Path, stamp: str) -> bool:
    """Whether `target` was completely written with this stamp."""
    path = target / _STAMP
    return path.is_file() and path.read_text() == stamp


def is_replaceable(target: Path) -> bool:
    """Whether nothing is lost with it but what `prepare` can write again."""
    return target.is_dir() and ((target / _STAMP).is_file() or not any(target.iterdir()))


@contextmanager
def new_folder(target: Path, stamp: str) -> Iterator[Path]:
    """A folder beside `target` to write into; it takes the place of `target` only if the block succeeds.

    InputError if `target` is anything else than such a folder of before, an empty one or a free name.
    """
    if target.exists() and not is_replaceable(target):
        raise InputError(f"{target}: is no prepared data set, and would be replaced; name a new or an empty folder")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{target}: cannot write a folder here ({error.strerror}); name another") from None
        yield partial
        (partial / _STAMP).write_text(stamp)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_schema(folder: Path, schema: Schema) -> None:
    (folder / "schema.yaml").write_text(dump_config(schema))


class SplitWriter:
    """Appends tables to ``folder/part-*.parquet``; row groups and parts have full size whatever the tables' sizes."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder, self._parts, self.rows = folder, 0, 0
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self._file: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        self.rows += table.num_rows
        self._waiting.append(table)
        self._waiting_rows += table.num_rows
        if self._waiting_rows >= ROW_GROUP:
            self._flush(self._waiting_rows - self._waiting_rows % ROW_GROUP)

    def _flush(self, rows: int) -> None:
        table = pa.concat_tables(self._waiting)
        self._waiting, self._waiting_rows = [table.slice(rows)], table.num_rows - rows
        for start in range(0, rows, ROW_GROUP):
            if self._file is None:
                path = self._folder / f"part-{self._parts:05d}.parquet"
                self._file = pq.ParquetWriter(path, table.schema, compression="snappy", write_page_checksum=True)
                self._parts, self._part_rows = self._parts + 1, 0
            group = table.slice(start, min(ROW_GROUP, rows - start))
            self._file.write_table(group, row_group_size=ROW_GROUP)
            self._part_rows += group.num_rows
            if self._part_rows >= _PART_ROWS:
                self._close_part()

    def _close_part(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None and self._waiting_rows:
            self._flush(self._waiting_rows)
        self._close_part()
