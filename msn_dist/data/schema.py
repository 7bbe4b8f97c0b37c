"""What the columns of a data set are: ids, histories, dense numbers, labels and the group of a row."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt, model_validator

from msn_dist.errors import InputError
from msn_dist.strict_yaml import Part, parse, read_yaml


class History(Part):
    """A user's past events, newest first, as list columns of equal length (one column per field)."""

    max_length: PositiveInt = Field(20, description="events kept per row")
    columns: dict[str, str] = Field(description="list column -> the id feature whose table it shares")


class Schema(Part):
    """The columns a model reads, in the order in which tensors hold them.

    `tables` maps an embedding table to its number of rows; an id must lie in [0, rows).
    `ids` maps an integer (or list of integers) column to its table.
    """

    name: str
    tables: dict[str, PositiveInt]
    ids: Annotated[dict[str, str], Field(min_length=1)]
    histories: dict[str, History] = {}
    dense: list[str] = []
    labels: Annotated[list[str], Field(min_length=1)]
    group: str = Field(description="integer column; GAUC and QAUC are computed within its values")

    @model_validator(mode="after")
    def _consistent(self) -> Schema:
        for column, table in self.ids.items():
            if table not in self.tables:
                raise ValueError(f"ids.{column} names table {table!r}, which is not one of {sorted(self.tables)}")
        for name, history in self.histories.items():
            for column, feature in history.columns.items():
                if feature not in self.ids:
                    raise ValueError(f"histories.{name}.columns.{column} names {feature!r}, which is not in ids")
        repeated = {key for key in self.sparse_keys if self.sparse_keys.count(key) > 1}
        if repeated:
            raise ValueError(f"columns {sorted(repeated)} appear twice")
        return self

    @property
    def sparse_keys(self) -> list[str]:
        """Keys of a batch's KeyedJaggedTensor, in order: ids, then every history's columns."""
        return [*self.ids, *(column for history in self.histories.values() for column in history.columns)]

    @property
    def max_lengths(self) -> dict[str, int]:
        """Most events of every history's column."""
        return {column: history.max_length for history in self.histories.values() for column in history.columns}

    def table_of(self, key: str) -> str:
        """The embedding table that a sparse key reads."""
        for history in self.histories.values():
            key = history.columns.get(key, key)
        return self.ids[key]


def load_schema(folder: str | Path) -> Schema:
    """Read ``schema.yaml`` of a prepared data folder; InputError says what is wrong with it."""
    path = Path(folder) / "schema.yaml"
    if not path.exists():
        raise InputError(f"{folder}: no schema.yaml here; write the data by `msn prepare`, or correct data.path")
    return parse(Schema, read_yaml(path), str(path))
