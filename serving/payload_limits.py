"""Reject bodies of MLflow's protocol that would take far more memory than they have bytes.

MLflow turns a body into frames and arrays, in which every row has all columns, and every cell the
size of the largest one. A body that has none of the protocol's shapes is not forwarded at all.
"""

import json
import re
from collections.abc import Iterable
from itertools import chain
from typing import Any

from serving.errors import RequestRejected

CSV = "text/csv"
NOT_MLFLOW_PROTOCOL = "the body is not of MLflow's protocol: see GET /openapi.json for examples"
FRAMES, ARRAYS = ("dataframe_split", "dataframe_records"), ("inputs", "instances")
KEYS = {*FRAMES, *ARRAYS, "params", "signature_name"}
MAX_ROWS = 1024
"""Rows of a frame: `serving.pyfunc.MAX_TILES`."""
MAX_COLUMNS = 1000
MAX_COMMAS, MAX_CELLS = 20_000, 4_000_000
"""Limits of CSV: pandas takes about 1 kB per column, and 8 bytes per empty cell."""
MAX_BRACKETS = 4_000_000
"""Lists and objects in JSON: Python takes 56 bytes or more for each."""
MAX_ARRAY_BYTES = 512_000_000
MAX_EXPANSION = 100
"""Size of an array, relative to its body. Base64 tiles need 4, and more if their sizes differ."""
CHARACTER_BYTES, NUMBER_BYTES = 4, 8
"""Size of a character and of a number in a NumPy array."""
NUMBER_CHARACTERS = 8
"""Characters of a number in an array of texts."""
LONG_NUMBER = re.compile(rb"[\[,:\s]-?\d{25}")
NUMBER_TYPES = {int, float, bool, type(None)}


def check(media_type: str, body: bytes) -> None:
    """Check a body before MLflow reads it.

    Raises:
        RequestRejected: the body would take too much memory, or is not of MLflow's protocol.
    """
    if media_type == CSV:
        _check_csv(body)
    else:
        _check_json(body)


def check_brackets(body: bytes) -> None:
    """Check JSON before it is parsed.

    Raises:
        RequestRejected: it holds more than `MAX_BRACKETS` lists and objects.
    """
    brackets = body.count(b"[") + body.count(b"{")
    if brackets > MAX_BRACKETS:
        raise RequestRejected(413, f"{brackets} lists and objects: send at most {MAX_BRACKETS}")


def _check_csv(body: bytes) -> None:
    unquoted = b"".join(body.split(b'"')[::2])  # quoted text may hold line ends
    lines = unquoted.count(b"\n") + unquoted.count(b"\r") - unquoted.count(b"\r\n")
    commas = body.count(b",")
    _check_rows(lines - 1)  # without the header
    if commas > MAX_COMMAS or commas * lines > MAX_CELLS:
        raise RequestRejected(413, f"{commas} commas in {lines} lines: send fewer columns or rows")


def _check_json(body: bytes) -> None:
    check_brackets(body)
    if LONG_NUMBER.search(body):
        raise RequestRejected(422, "a number of over 24 digits: send a shorter number")
    try:
        payload = json.loads(body)
    except ValueError:
        return  # MLflow's own error is translated
    except RecursionError as error:
        raise RequestRejected(400, NOT_MLFLOW_PROTOCOL) from error
    if not isinstance(payload, dict) or not payload.keys() <= KEYS:
        raise RequestRejected(400, NOT_MLFLOW_PROTOCOL)
    max_bytes = min(MAX_ARRAY_BYTES, MAX_EXPANSION * len(body))
    split = payload.get("dataframe_split")
    if isinstance(split, dict):
        _check_rows(len(_flat_list(split.get("index"))))
        _check_columns(len(_flat_list(split.get("columns"))))
        split = split.get("data")
    for frame in (split, payload.get("dataframe_records")):
        _check_frame(frame, max_bytes)
    for key in ARRAYS:
        array = payload.get(key)
        if isinstance(array, dict) or (isinstance(array, list) and dict in map(type, array)):
            _check_frame(array, max_bytes)
        else:
            _check_array(array, max_bytes)


def _flat_list(names: Any) -> list[Any]:
    if names is None:
        return []
    if not isinstance(names, list) or any(isinstance(name, list | dict) for name in names):
        raise RequestRejected(400, NOT_MLFLOW_PROTOCOL)
    return names


def _check_frame(data: Any, max_bytes: int) -> None:
    """Check an object of columns, or a list of rows; anything else is left to MLflow's error."""
    if isinstance(data, dict):
        rows, columns, cells = _columns_shape(data)
    elif isinstance(data, list):
        rows, columns, cells = _rows_shape(data)
    else:
        return
    _check_rows(rows)
    _check_columns(columns)
    longest = max((_size(cell)[1] for cell in cells), default=0)
    _check_bytes(len(cells) * longest * CHARACTER_BYTES, max_bytes)
    _check_array(cells, max_bytes)


def _columns_shape(data: dict[str, Any]) -> tuple[int, int, list[Any]]:
    """Return the number of rows and columns, and the cells, of an object of columns."""
    columns = data.values()
    if dict in map(type, columns):
        raise RequestRejected(400, NOT_MLFLOW_PROTOCOL)
    lists = [column if type(column) is list else [column] for column in columns]
    return max(map(len, lists), default=0), len(data), _flatten(lists)


def _rows_shape(data: list[Any]) -> tuple[int, int, list[Any]]:
    """Return the number of rows and columns, and the cells; rows must be of one kind."""
    kinds = {kind if kind in (dict, list) else None for kind in map(type, data)}
    if len(kinds) > 1:
        raise RequestRejected(400, NOT_MLFLOW_PROTOCOL)
    if kinds == {dict}:
        return len(data), len(set().union(*data)), _flatten(row.values() for row in data)
    if kinds == {list}:
        return len(data), max(map(len, data), default=0), _flatten(data)
    return len(data), 1, data


def _flatten(rows: Iterable[Iterable[Any]]) -> list[Any]:
    return list(chain.from_iterable(rows))


def _check_array(array: Any, max_bytes: int) -> None:
    cells, _, longest = _size(array)
    text_bytes = CHARACTER_BYTES * max(longest, NUMBER_CHARACTERS)
    _check_bytes(cells * (text_bytes if longest else NUMBER_BYTES), max_bytes)


def _check_rows(rows: int) -> None:
    if rows > MAX_ROWS:
        raise RequestRejected(413, f"{rows} rows in one request: send 1 to {MAX_ROWS}")


def _check_columns(columns: int) -> None:
    if columns > MAX_COLUMNS:
        raise RequestRejected(413, f"{columns} columns in one request: send 1 to {MAX_COLUMNS}")


def _check_bytes(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        message = "one value is much longer than the others: send it in a request of its own"
        raise RequestRejected(413, message)


def _size(value: Any) -> tuple[int, int, int]:
    """Return the cells of nested lists, their characters as text, and the longest text's length."""
    cells, characters, longest, stack = 0, 0, 0, [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            raise RequestRejected(400, NOT_MLFLOW_PROTOCOL)
        if isinstance(item, str):
            cells, characters, longest = cells + 1, characters + len(item), max(longest, len(item))
        elif not isinstance(item, list):
            cells, characters = cells + 1, characters + NUMBER_CHARACTERS
        elif set(map(type, item)) <= NUMBER_TYPES:
            cells, characters = cells + len(item), characters + NUMBER_CHARACTERS * len(item)
        else:
            stack.extend(item)
    return cells, characters, longest
