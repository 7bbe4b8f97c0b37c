"""How long the lists of a data set are."""

from __future__ import annotations

import math
from pathlib import Path

from msn_dist.data.row_group import open_file
from msn_dist.data.schema import Schema


def mean_lengths(split: Path, schema: Schema) -> dict[str, float]:
    """Ids of a mean row in every list column that the model reads, by the footer of the split's first file.

    Lists longer than `max_length` may hide behind shorter ones.  A column without these counts is left out, and so are
    all if there is no row; raises InputError if it is not one of this schema.
    """
    first = min(split.glob("*.parquet"), default=None)
    if first is None or not (footer := open_file(first, schema)).num_rows:
        return {}
    most = schema.max_lengths
    names = footer.schema.to_arrow_schema().names
    ids: dict[str, float] = {}
    for group in map(footer.row_group, range(footer.num_row_groups)):
        for part in map(group.column, range(group.num_columns)):
            path = part.path_in_schema
            column = max((name for name in names if f"{path}.".startswith(f"{name}.")), key=len)  # it may have dots
            if column in schema.sparse_keys and path != column:
                counted = part.statistics is not None and part.statistics.has_null_count
                # an empty list counts as a value that is null
                here = part.num_values - part.statistics.null_count if counted else math.nan
                ids[column] = ids.get(column, 0) + here
    known = {column: number for column, number in ids.items() if not math.isnan(number)}
    return {column: min(number / footer.num_rows, most.get(column, number)) for column, number in known.items()}
