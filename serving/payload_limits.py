"""Bodies of MLflow's protocol that would take far more memory than they have bytes.

MLflow makes frames and arrays of them whose every row has the columns, and whose every cell the
size, of the largest. What has none of the protocol's shapes is not handed on at all.
"""

import json
import re
from typing import Any

from serving.errors import Refused

CSV = "text/csv"
NOT_THE_PROTOCOL = "the request is not of MLflow's protocol: see GET /openapi.json for an example"
FRAMES, ARRAYS = ("dataframe_split", "dataframe_records"), ("inputs", "instances")
KEYS = {*FRAMES, *ARRAYS, "params", "signature_name"}
MOST_ROWS = 1024
"""Of a frame: `serving.pyfunc.MAX_TILES`."""
MOST_COLUMNS = 1000
MOST_COMMAS, MOST_CELLS = 20_000, 4_000_000
"""Of CSV: pandas takes a kilobyte for a column, and 8 bytes for a cell that is not told."""
MOST_BRACKETS = 4_000_000
"""Lists and objects of JSON, of which Python makes 56 bytes and more each."""
MOST_BYTES, MOST_TIMES = 512_000_000, 100
"""Of an array that is made of a body, and in bytes of the body: that of tiles in base64 has four
times as many, and more where their sizes differ.
"""
CHARACTER_BYTES, NUMBER_BYTES, NUMBER_CHARACTERS = 4, 8, 8
"""Of NumPy's texts and numbers, and what a number takes among texts."""
LONG_NUMBER = re.compile(rb"[\[,:\s]-?\d{25}")
NUMBERS = {int, float, bool, type(None)}


def check(kind: str, body: bytes) -> None:
    """Before MLflow reads a body of that media type.

    Raises:
        Refused: it would take the machine's memory, or is none of MLflow's protocol.
    """
    if kind == CSV:
        _check_csv(body)
    else:
        _check_json(body)


def check_brackets(body: bytes) -> None:
    """Before JSON is read.

    Raises:
        Refused: it holds too many.
    """
    brackets = body.count(b"[") + body.count(b"{")
    if brackets > MOST_BRACKETS:
        raise Refused(413, f"{brackets} lists and objects: send {MOST_BRACKETS} at most")


def _check_csv(body: bytes) -> None:
    bare = b"".join(body.split(b'"')[::2])  # without what is quoted, which may hold line ends
    lines = bare.count(b"\n") + bare.count(b"\r") - bare.count(b"\r\n")
    commas = body.count(b",")
    _check_rows(lines - 1)  # the first names the columns
    if commas > MOST_COMMAS or commas * lines > MOST_CELLS:
        raise Refused(413, f"{commas} commas in {lines} lines: send fewer columns, or rows")


def _check_json(body: bytes) -> None:
    check_brackets(body)
    if LONG_NUMBER.search(body):
        raise Refused(422, "a number of over 24 digits: send it as a text")
    try:
        told = json.loads(body)
    except ValueError:
        return  # MLflow says what is wrong with it
    except RecursionError as error:
        raise Refused(400, NOT_THE_PROTOCOL) from error
    if not isinstance(told, dict) or not told.keys() <= KEYS:
        raise Refused(400, NOT_THE_PROTOCOL)
    most_bytes = min(MOST_BYTES, MOST_TIMES * len(body))
    split = told.get("dataframe_split")
    if isinstance(split, dict):
        _check_rows(len(_scalars(split.get("index"))))
        _check_columns(len(_scalars(split.get("columns"))))
        split = split.get("data")
    for frame in (split, told.get("dataframe_records")):
        _check_frame(frame, most_bytes)
    for name in ARRAYS:
        array = told.get(name)
        if isinstance(array, dict) or (isinstance(array, list) and dict in map(type, array)):
            _check_frame(array, most_bytes)
        else:
            _check_array(array, most_bytes)


def _scalars(names: Any) -> list[Any]:
    if names is None:
        return []
    if not isinstance(names, list) or any(isinstance(one, list | dict) for one in names):
        raise Refused(400, NOT_THE_PROTOCOL)
    return names


def _check_frame(data: Any, most_bytes: int) -> None:
    """An object of columns, or a list of rows that are all objects, all lists or all values."""
    if isinstance(data, dict):
        if dict in map(type, data.values()):
            raise Refused(400, NOT_THE_PROTOCOL)
        columns, rows = len(data), max((_length(one) for one in data.values()), default=0)
        cells = [cell for one in data.values() for cell in (one if type(one) is list else [one])]
    elif isinstance(data, list):
        kinds = {kind if kind in (dict, list) else None for kind in map(type, data)}
        if len(kinds) > 1:
            raise Refused(400, NOT_THE_PROTOCOL)
        rows, columns, cells = len(data), 1, data
        if kinds == {dict}:
            columns = len(set().union(*data))
            cells = [cell for row in data for cell in row.values()]
        elif kinds == {list}:
            columns = max(map(len, data), default=0)
            cells = [cell for row in data for cell in row]
    else:
        return  # MLflow says what is wrong with it
    _check_rows(rows)
    _check_columns(columns)
    longest = max((_size(cell)[1] for cell in cells), default=0)
    _check_bytes(len(cells) * longest * CHARACTER_BYTES, most_bytes)
    _check_array(cells, most_bytes)


def _check_array(array: Any, most_bytes: int) -> None:
    cells, _, longest = _size(array)
    each = CHARACTER_BYTES * max(longest, NUMBER_CHARACTERS) if longest else NUMBER_BYTES
    _check_bytes(cells * each, most_bytes)


def _check_rows(rows: int) -> None:
    if rows > MOST_ROWS:
        raise Refused(413, f"{rows} rows in one request: send 1 to {MOST_ROWS}")


def _check_columns(columns: int) -> None:
    if columns > MOST_COLUMNS:
        raise Refused(413, f"{columns} columns in one request: send 1 to {MOST_COLUMNS}")


def _check_bytes(size: int, most: int) -> None:
    if size > most:
        raise Refused(413, "a long value among many short ones: send them in requests of their own")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list) else 1


def _size(value: Any) -> tuple[int, int, int]:
    """Of nested lists: values, characters of them all as text, characters of the longest text."""
    cells, characters, longest, stack = 0, 0, 0, [value]
    while stack:
        one = stack.pop()
        if isinstance(one, dict):
            raise Refused(400, NOT_THE_PROTOCOL)
        if isinstance(one, str):
            cells, characters, longest = cells + 1, characters + len(one), max(longest, len(one))
        elif not isinstance(one, list):
            cells, characters = cells + 1, characters + NUMBER_CHARACTERS
        elif set(map(type, one)) <= NUMBERS:
            cells, characters = cells + len(one), characters + NUMBER_CHARACTERS * len(one)
        else:
            stack.extend(one)
    return cells, characters, longest
