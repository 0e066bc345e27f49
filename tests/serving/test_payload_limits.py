"""Bodies that are small on their way and large in memory."""

import base64
import json
from typing import Any

import numpy as np
import pytest

from serving import payload_limits
from serving.errors import Refused
from tests.support import malformed_requests
from tests.support.registry import MLFLOW_WARNS

pytestmark = MLFLOW_WARNS
JSON = "application/json"


def test_it_allows_as_many_rows_as_the_model_does() -> None:
    from serving.pyfunc import MAX_TILES

    assert payload_limits.MOST_ROWS == MAX_TILES


def tiles(count: int) -> list[list[str]]:
    """Files of other lengths, in base64."""
    lengths = np.random.default_rng(0).integers(500, 12_000, count)
    return [[base64.b64encode(bytes(int(length))).decode()] for length in lengths]


@pytest.mark.parametrize(
    "told",
    [
        {
            "dataframe_split": {
                "columns": ["image"],
                "index": list(range(1024)),
                "data": tiles(1024),
            }
        },
        {"dataframe_split": {"columns": ["image"], "data": [row[0] for row in tiles(99)]}},
        {"dataframe_records": [{"image": row[0]} for row in tiles(1024)]},
        {"inputs": tiles(1024)},
        {"inputs": {"image": [row[0] for row in tiles(256)]}},
        {"instances": np.zeros((400, 64, 64, 3), np.uint8).tolist(), "params": {"top_k": 2}},
        {"instances": [{"image": np.zeros((64, 64, 13)).tolist()}] * 50},
        {"inputs": "x"},
        {"dataframe_split": None, "dataframe_records": 5, "inputs": None},
    ],
)
def test_what_can_be_answered_is_let_through(told: Any) -> None:
    payload_limits.check(JSON, json.dumps(told, separators=(",", ":")).encode())


def test_a_table_of_tiles_is_let_through() -> None:
    lines = ["image,where", *(f"{row[0]},here" for row in tiles(1024))]
    for end in ("\n", "\r\n"):
        payload_limits.check(payload_limits.CSV, (end.join(lines) + end).encode())
    quoted = ["image", *(f'"{base64.encodebytes(bytes(5000)).decode()}"' for _ in range(99))]
    payload_limits.check(payload_limits.CSV, "\n".join(quoted).encode())


@pytest.mark.parametrize("name", list(malformed_requests.bombs()))
def test_what_would_grow_is_refused(name: str) -> None:
    with pytest.raises(Refused, match="send"):
        payload_limits.check(JSON, json.dumps(malformed_requests.bombs()[name]).encode())


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (payload_limits.CSV, b"image\n" + b"x\n" * 1025),
        (payload_limits.CSV, b"image\r" + b"x\r" * 1025),
        (payload_limits.CSV, b"," * 30_000),
        (payload_limits.CSV, b"," * 15_000 + b"\n1" * 1000),
        (JSON, b"[]" * 5_000_000),
        (JSON, b'{"inputs": [' + b"9" * 4000 + b', "x"]}'),
    ],
)
def test_few_bytes_are_not_many_rows(kind: str, body: bytes) -> None:
    with pytest.raises(Refused, match="send"):
        payload_limits.check(kind, body)


@pytest.mark.parametrize("name", list(malformed_requests.strange()))
def test_what_is_none_of_the_protocol_is_not_handed_on(name: str) -> None:
    with pytest.raises(Refused, match="not of MLflow's protocol"):
        payload_limits.check(JSON, json.dumps(malformed_requests.strange()[name]).encode())
    with pytest.raises(Refused, match="not of MLflow's protocol"):
        payload_limits.check(JSON, b"[" * 100_000)


def test_what_is_no_json_is_left_to_mlflow() -> None:
    for body in (b"{", b"\xff", b""):
        payload_limits.check(JSON, body)
