"""Read a Parquet table of predictions, after its metadata show that it is not too large.

Parquet stores a value that repeats once, so a file of kilobytes can unpack to gigabytes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eurosat.errors import ModelError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

MAX_ROWS = 500_000
"""A test fold of EuroSAT has 5,400 rows, its corrupted tiles 2,000."""
MAX_COLUMNS = 1000
MAX_CELLS = 20_000_000
"""160 MB as float64."""
MAX_UNPACKED_MB = 256
"""Of all columns, or of one column's texts."""
MAX_CHARACTERS = 1024
"""Of a path, a sha256 or a class."""


class TableTooLarge(ModelError):
    """A table over a limit; the message names the value and the limit, not the remedy."""


def read(file: Path, texts: Sequence[str], number_prefix: str) -> "pd.DataFrame":
    """Return the columns of numbers, those named in ``texts`` and those with the prefix.

    Columns of ``texts`` that the file does not have are left out.

    Raises:
        TableTooLarge: the table has more rows, columns or bytes than the limits allow.
        ValueError, OSError: the file is not such a table.
    """
    import pyarrow as pa
    from pyarrow import parquet

    schema = parquet.read_schema(file)
    dictionaries = [name for name in schema.names if name in texts and _is_text(schema, name)]
    with parquet.ParquetFile(file, read_dictionary=dictionaries) as opened:
        _check_metadata(opened.metadata)
        names = [name for name in schema.names if name in texts or name.startswith(number_prefix)]
        for name in names:
            if name not in dictionaries and not _is_number(schema, name):
                raise ValueError(f"the column {name} is of type {schema.field(name).type}")
        table = opened.read(columns=names, use_threads=False)
    for name in dictionaries:
        column = table.column(name)
        _check_texts(name, column)
        place = table.column_names.index(name)
        table = table.set_column(place, name, column.cast(pa.string()))
    frame: pd.DataFrame = table.to_pandas(ignore_metadata=True, use_threads=False)
    return frame


def _is_text(schema: "pa.Schema", name: str) -> bool:
    from pyarrow import types

    kind = schema.field(name).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _is_number(schema: "pa.Schema", name: str) -> bool:
    from pyarrow import types

    kind = schema.field(name).type
    return bool(types.is_floating(kind) or types.is_integer(kind))


def _check_metadata(metadata: "pa.parquet.FileMetaData") -> None:
    rows, columns = metadata.num_rows, metadata.num_columns
    unpacked_mb = sum(metadata.row_group(k).total_byte_size for k in range(metadata.num_row_groups))
    unpacked_mb /= 1e6
    for value, limit, what in (
        (rows, MAX_ROWS, "rows"),
        (columns, MAX_COLUMNS, "columns"),
        (rows * columns, MAX_CELLS, "cells"),
    ):
        if value > limit:
            raise TableTooLarge(f"has {value} {what}, over {limit}")
    if unpacked_mb > MAX_UNPACKED_MB:
        raise TableTooLarge(f"has {unpacked_mb:.0f} MB unpacked, over {MAX_UNPACKED_MB} MB")


def _check_texts(name: str, column: "pa.ChunkedArray") -> None:
    """Check texts while each of them is held once."""
    from pyarrow import compute

    lengths = [compute.max(compute.binary_length(chunk.dictionary)) for chunk in column.chunks]
    longest = max((length.as_py() or 0 for length in lengths), default=0)
    if longest > MAX_CHARACTERS:
        raise TableTooLarge(f"has {longest} characters in the column {name}, over {MAX_CHARACTERS}")
    texts_mb = longest * len(column) / 1e6
    if texts_mb > MAX_UNPACKED_MB:
        raise TableTooLarge(f"has {texts_mb:.0f} MB in {name} unpacked, over {MAX_UNPACKED_MB} MB")
