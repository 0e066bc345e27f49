"""Bodies that are small in bytes and large in memory."""

import base64
import json
from typing import Any

import numpy as np
import pytest

from serving import payload_limits
from serving.errors import RequestRejected
from tests.support import malformed_requests
from tests.support.registry import MLFLOW_WARNS

pytestmark = MLFLOW_WARNS
JSON = "application/json"


def test_the_limit_of_rows_is_that_of_the_model() -> None:
    from serving.pyfunc import MAX_TILES

    assert payload_limits.MAX_ROWS == MAX_TILES


def tiles(count: int) -> list[list[str]]:
    """Return rows of base64 files of different lengths."""
    lengths = np.random.default_rng(0).integers(500, 12_000, count)
    return [[base64.b64encode(bytes(int(length))).decode()] for length in lengths]


@pytest.mark.parametrize(
    "payload",
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
def test_valid_payloads_pass(payload: Any) -> None:
    payload_limits.check(JSON, json.dumps(payload, separators=(",", ":")).encode())


def test_a_csv_of_tiles_passes() -> None:
    lines = ["image,where", *(f"{row[0]},here" for row in tiles(1024))]
    for end in ("\n", "\r\n"):
        payload_limits.check(payload_limits.CSV, (end.join(lines) + end).encode())
    quoted = ["image", *(f'"{base64.encodebytes(bytes(5000)).decode()}"' for _ in range(99))]
    payload_limits.check(payload_limits.CSV, "\n".join(quoted).encode())


@pytest.mark.parametrize("name", list(malformed_requests.memory_bombs()))
def test_payloads_that_would_grow_in_memory_are_rejected(name: str) -> None:
    with pytest.raises(RequestRejected, match="send"):
        payload_limits.check(JSON, json.dumps(malformed_requests.memory_bombs()[name]).encode())


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
def test_few_bytes_may_not_become_many_cells(kind: str, body: bytes) -> None:
    with pytest.raises(RequestRejected, match="send"):
        payload_limits.check(kind, body)


@pytest.mark.parametrize("name", list(malformed_requests.outside_protocol()))
def test_payloads_outside_the_protocol_are_rejected(name: str) -> None:
    with pytest.raises(RequestRejected, match="not of MLflow's protocol"):
        payload_limits.check(JSON, json.dumps(malformed_requests.outside_protocol()[name]).encode())
    with pytest.raises(RequestRejected, match="not of MLflow's protocol"):
        payload_limits.check(JSON, b"[" * 100_000)


def test_bodies_that_are_not_json_are_left_to_mlflow() -> None:
    for body in (b"{", b"\xff", b""):
        payload_limits.check(JSON, body)
