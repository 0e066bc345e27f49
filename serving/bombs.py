"""Bodies of MLflow's protocol that would take far more memory than they have bytes.

MLflow makes frames and arrays of them whose every row has the columns, and whose every cell the
size, of the largest.
"""

import json
from collections.abc import Sized
from typing import Any

from serving.refusals import Refused

CSV = "text/csv"
MOST_ROWS = 1024
"""Of a frame: `serving.pyfunc.MAX_TILES`."""
MOST_COLUMNS = 1000
MOST_COMMAS = 20_000
"""Of CSV: tiles in base64 have none, and pandas takes a kilobyte for each column."""
MOST_BRACKETS = 4_000_000
"""Lists and objects of JSON, of which Python makes 56 bytes and more each."""
MOST_BYTES, MOST_TIMES = 512_000_000, 100
"""Of an array that is made of "inputs" or "instances", and in bytes of the body: that of tiles in
base64 has four times as many, and more where their sizes differ.
"""
NUMBER_CHARS = 24
"""Of a number that stands in an array of texts."""
NUMBERS = {int, float, bool, type(None)}


def check(kind: str, body: bytes) -> None:
    """Before MLflow reads a body of that media type.

    Raises:
        Refused: it would take the machine's memory.
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
    lines = body.count(b"\n") + body.count(b"\r") - body.count(b"\r\n")
    _check_size(lines - 1, 0)  # the first names the columns
    if (commas := body.count(b",")) > MOST_COMMAS:
        raise Refused(413, f"{commas} commas in one request: send {MOST_COMMAS} at most")


def _check_json(body: bytes) -> None:
    check_brackets(body)
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        return  # MLflow says what is wrong with it
    if not isinstance(told, dict):
        return
    if isinstance(split := told.get("dataframe_split"), dict):
        for name in ("columns", "index"):
            _check_size(0, _length(split.get(name)))
        _check_frame(split.get("data"))
    _check_frame(told.get("dataframe_records"))
    array = [told.get("inputs"), told.get("instances")]
    _check_array(array, min(MOST_BYTES, MOST_TIMES * len(body)))


def _check_frame(data: Any) -> None:
    """A list of rows, each a list or an object; or an object of columns."""
    if isinstance(data, dict):
        _check_size(max(map(_length, data.values()), default=0), len(data))
    elif isinstance(data, list):
        _check_size(len(data), max(map(_length, data), default=0))
        named: set[str] = set()
        for row in data:
            named.update(row if isinstance(row, dict) else ())
        _check_size(0, len(named))


def _check_size(rows: int, columns: int) -> None:
    if rows > MOST_ROWS:
        raise Refused(413, f"{rows} rows in one request: send 1 to {MOST_ROWS}")
    if columns > MOST_COLUMNS:
        raise Refused(413, f"{columns} columns in one request: send 1 to {MOST_COLUMNS}")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, Sized) and not isinstance(value, str) else 1


def _check_array(value: Any, most_bytes: int) -> None:
    cells, longest, stack = 0, 0, [value]
    while stack:
        one = stack.pop()
        if isinstance(one, dict):
            stack.extend(one.values())
        elif not isinstance(one, list):
            cells += 1
            longest = max(longest, len(one) if isinstance(one, str) else 0)
        elif set(map(type, one)) <= NUMBERS:
            cells += len(one)
        else:
            stack.extend(one)
    cell_bytes = 4 * max(longest, NUMBER_CHARS) if longest else 8
    if cells * cell_bytes > most_bytes:
        raise Refused(413, "a long value among many short ones: send them in requests of their own")
