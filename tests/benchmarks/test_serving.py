"""Parts of bench-serving: the client, the summary, and the network that is served."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving import model
from benchmarks.serving.load import Requests, load, parse
from benchmarks.serving.summary import (
    GOAL_CONCURRENCY,
    LIMIT,
    OURS,
    Measurement,
    goals,
    rows,
)

WRK_OUTPUT = """Running 1s test @ http://127.0.0.1:8765
  1 threads and 2 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.72ms    2.43ms  23.54ms   91.78%
    Req/Sec     1.62k   228.46     1.91k    70.00%
  1612 requests in 1.00s, 0.85MB read
  Non-2xx or 3xx responses: 12
Requests/sec:   1611.28
Transfer/sec:      0.85MB
{"requests": 1612, "seconds": 2.000000, "p50_ms": 0.756, "p95_ms": 4.916, "p99_ms": 13.926, \
"connect": 0, "read": 1, "write": 0, "timeout": 2, "status": 12}
"""
"""Of wrk 4.1.0 with our script; the seconds and some zeros were changed."""


def test_rejected_requests_count_as_errors_and_not_as_answers() -> None:
    result = parse(WRK_OUTPUT)
    assert (result.answered, result.errors, result.rate) == (1600, 15, 800.0)
    assert (result.p50_ms, result.p95_ms, result.p99_ms) == (0.756, 4.916, 13.926)


def test_a_client_without_a_server_ends_the_benchmark_with_the_reason() -> None:
    with pytest.raises(SystemExit, match="error: wrk printed no result: .*unable to connect"):
        parse("unable to connect to 127.0.0.1:1 Connection refused\n")


class _Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received: set[tuple[str, str | None, bytes]] = set()


class _Handler(BaseHTTPRequestHandler):
    """Answers 503 to the body ``two``."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.add((self.path, self.headers["Content-Type"], body))
        self.send_response(503 if body == b"two" else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Print nothing; there are thousands of requests."""


@contextmanager
def listening() -> Iterator[_Server]:
    server = _Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_wrk_posts_every_body_in_turn_and_counts_the_errors(tmp_path: Path) -> None:
    if not shutil.which("wrk"):
        pytest.skip("wrk is not installed: apt-get install wrk")
    bodies = (b"one", b"two", b"\xff\xd8\x00\n")
    for number, body in enumerate(bodies, start=1):
        (tmp_path / str(number)).write_bytes(body)
    posted = Requests(folder=tmp_path, count=3, path="/predict", content_type="image/jpeg")
    with listening() as server:
        result = load(server.server_address[1], posted, concurrency=2, seconds=1)
    assert server.received == {("/predict", "image/jpeg", body) for body in bodies}
    assert result.errors == pytest.approx(result.answered / 2, abs=2)
    assert result.answered > 10
    assert 0 < result.p50_ms <= result.p95_ms <= result.p99_ms


def measurements(**rates: tuple[float, float]) -> list[Measurement]:
    """Return measurements of two rounds at the concurrency of the goals; p99 is 1000 / rate."""
    return [
        Measurement(
            arm=arm.replace("_", "-"),
            round=number,
            concurrency=GOAL_CONCURRENCY,
            rate=rate,
            p50_ms=1.0,
            p95_ms=2.0,
            p99_ms=1000 / rate,
            memory_mb=10 * rate,
        )
        for arm, per_round in rates.items()
        for number, rate in enumerate(per_round)
    ]


def values(results: list[dict[str, Any]]) -> dict[str, float]:
    return {goal["name"].removeprefix("serving."): goal["value"] for goal in results}


def test_goals_are_medians_of_the_ratios_within_a_round() -> None:
    measured = measurements(
        server=(800, 400),
        mlflow=(100, 40),
        fastapi=(200, 80),
        litserve_onnx=(400, 400),
        bentoml_onnx=(500, 200),
        limit=(1000, 1000),
    )
    measured.append(Measurement(arm=OURS, round=0, concurrency=1, rate=300, p50_ms=3.0, p99_ms=9.0))
    results = goals(measured)
    assert values(results) == {
        "vs_mlflow": 9,
        "vs_fastapi": 4.5,
        "vs_best_peer": 1.3,
        "p99_vs_best_peer": 0.8125,
        "vs_limit": 0.6,
        "p50_ms": 3,
    }
    assert all(goal["met"] for goal in results)


def test_a_goal_without_its_arms_is_left_out() -> None:
    assert set(
        values(goals(measurements(server=(8, 8), fastapi=(2, 2), litserve_onnx=(4, 4))))
    ) == {
        "vs_fastapi",
        "p99_vs_best_peer",
    }
    assert goals(measurements(mlflow=(8, 8), limit=(9, 9))) == []


def test_the_latency_of_a_peer_with_errors_is_not_compared() -> None:
    measured = measurements(server=(100, 100), mlflow=(50, 50))
    for number in (0, 1):
        measured.append(
            Measurement(
                arm="fastapi",
                round=number,
                concurrency=GOAL_CONCURRENCY,
                rate=0.0,
                p99_ms=0.1,
                errors=7,
            )
        )
    ratios = values(goals(measured))
    assert ratios["p99_vs_best_peer"] == 0.5
    assert ratios["vs_fastapi"] == 100


def test_rows_have_medians_all_errors_and_the_largest_memory() -> None:
    measured = measurements(server=(100, 300), limit=(900, 900))
    measured.append(Measurement(arm=OURS, round=0, concurrency=1, rate=10, errors=2))
    measured.append(Measurement(arm=OURS, round=1, concurrency=1, rate=30, errors=1))
    single, many, limit = rows(measured, [OURS, LIMIT], {OURS: 0.01234})
    assert (single["concurrency"], single["images_per_s"], single["errors"]) == (1, 20, 3)
    assert (many["concurrency"], many["images_per_s"], many["memory_mb"]) == (
        GOAL_CONCURRENCY,
        200,
        3000,
    )
    assert many["idle_cores"] == 0.012
    assert (limit["concurrency"], limit["images_per_s"], limit["idle_cores"]) == (None, 900, None)
    assert list(single) == list(many) == list(limit)


def test_the_peers_get_the_same_network_as_our_server(tmp_path: Path) -> None:
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts/model.onnx").touch()
    assert model.onnx_file(tmp_path).name == "model.onnx"
    (tmp_path / "artifacts/model.int8.onnx").touch()
    assert model.onnx_file(tmp_path).name == "model.int8.onnx"
