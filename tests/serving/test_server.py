"""A real ``python -m serving.server``, called over REST."""

import base64
import contextlib
import hashlib
import http.client
import io
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnxruntime
import psutil
import pytest
import requests
from PIL import Image

from eurosat.errors import ConfigError
from eurosat.runtime import exit_codes
from registry import versions
from serving import client, keys, server
from serving.app import openapi_schema
from serving.errors import RequestRejected
from serving.limits import Limits, TokenBucket
from tests.support import processes
from tests.support.commands import fails, last_error
from tests.support.images import COLOURS, encoded, files, raw, saved
from tests.support.mlflow_server import free_port
from tests.support.registry import CLASSES, REGISTRY, TAGS
from tests.support.serving import (
    CALIBRATION,
    Server,
    make_champion,
    make_full_network,
    read_answer,
    running,
    until,
)

pytestmark = REGISTRY

QUEUE, TILES, BODY_MB = 32, 64, 2


@pytest.fixture(scope="module")
def version(store: Path) -> str:
    return make_champion(store)


@pytest.fixture(scope="module")
def pair(store: Path, version: str) -> Iterator[Server]:
    """Start a server of two processes."""
    with running(store, processes=2) as server:
        yield server


@pytest.fixture(scope="module")
def secrets(store: Path) -> dict[str, str]:
    """Create a key without a real limit, and one for a request every ten seconds."""
    return {name: keys.create(store / "keys.txt", name, rate) for name, rate in KEYS.items()}


TIMEOUT_S = 60
"""Of a request, so that an answer that is lost fails its test."""
KEYS = {"team": 10_000.0, "visitor": 0.1}


@pytest.fixture(scope="module")
def strict(store: Path, version: str, secrets: dict[str, str]) -> Iterator[Server]:
    """Start a server of one process that requires keys, with small limits and batches of 1."""
    flags = ["--keys", "keys.txt", "--max-queue", str(QUEUE), "--max-tiles", str(TILES)]
    flags += ["--max-body-mb", str(BODY_MB), "--max-batch", "1"]
    with running(store, *flags) as server:
        yield server


@pytest.fixture
def bearer(secrets: dict[str, str]) -> dict[str, str]:
    return {"Authorization": f"Bearer {secrets['team']}"}


def halves() -> npt.NDArray[np.uint8]:
    """Return a tile that is Forest in its left half, and River in its right half and on average."""
    tile = np.full((64, 64, 3), (90, 30, 20), np.uint8)
    tile[:, 32:] = (10, 250, 20)
    return tile


def run_onnx(folder: Path, *tiles: npt.NDArray[np.uint8], tta: bool = False) -> Any:
    network = make_full_network(folder / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(network, options)
    inputs = {"tiles_NHWC": np.stack(tiles), "tta": np.array(tta)}
    names = ["probabilities", "energy", "activation"]
    return dict(zip(names, session.run(names, inputs), strict=True))


def predict(url: str, image: bytes, query: str = "", **headers: str) -> requests.Response:
    fields = {"Content-Type": "image/jpeg"} | {k.replace("_", "-"): v for k, v in headers.items()}
    return requests.post(f"{url}/predict{query}", data=image, headers=fields, timeout=30)


def rejection(answer: requests.Response, status: int) -> str:
    """Check the shape of an error, and return its message."""
    assert answer.status_code == status, answer.text[:500]
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"error_code", "message"}
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    return str(answer.json()["message"])


def by_body(url: str, kind: str, images: list[bytes]) -> list[dict[str, Any]]:
    headers = {"Content-Type": f"image/{kind.lower()}"}
    answers = [
        requests.post(f"{url}/predict", data=image, headers=headers, timeout=TIMEOUT_S)
        for image in images
    ]
    return [answer.json() for answer in answers]


def by_form(url: str, kind: str, images: list[bytes]) -> list[dict[str, Any]]:
    answers = [
        requests.post(f"{url}/predict", files={"file": image}, timeout=TIMEOUT_S)
        for image in images
    ]
    return [answer.json() for answer in answers]


def by_batch_of_files(url: str, kind: str, images: list[bytes]) -> list[dict[str, Any]]:
    sent = [("files", (f"{number}", image)) for number, image in enumerate(images)]
    answer = requests.post(f"{url}/predict/batch", files=sent, timeout=TIMEOUT_S).json()
    return list(answer["predictions"])


def by_batch_of_base64(url: str, kind: str, images: list[bytes]) -> list[dict[str, Any]]:
    texts = [base64.b64encode(image).decode() for image in images]
    answer = requests.post(f"{url}/predict/batch", json={"images": texts}, timeout=TIMEOUT_S).json()
    return list(answer["predictions"])


def by_invocations(url: str, kind: str, images: list[bytes]) -> list[dict[str, Any]]:
    answer = requests.post(f"{url}/invocations", json=files(*images), timeout=TIMEOUT_S).json()
    return list(answer["predictions"])


def by_pixels(url: str, kind: str, images: list[bytes]) -> list[dict[str, Any]]:
    tiles = [np.asarray(Image.open(io.BytesIO(image))) for image in images]
    return list(
        requests.post(f"{url}/invocations", json=raw(*tiles), timeout=TIMEOUT_S).json()[
            "predictions"
        ]
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize(
    "send",
    [by_body, by_form, by_batch_of_files, by_batch_of_base64, by_invocations, by_pixels],
)
def test_every_route_predicts_the_same_as_onnx_runtime(
    pair: Server,
    version: str,
    tmp_path: Path,
    kind: str,
    send: Callable[[str, str, list[bytes]], list[dict[str, Any]]],
) -> None:
    images = [encoded(label, kind) for label in COLOURS]
    tiles = [np.asarray(Image.open(io.BytesIO(image))) for image in images]
    expected = run_onnx(tmp_path, *tiles)
    answers = send(pair.url, kind, images)
    probabilities = [list(answer["probabilities"].values()) for answer in answers]
    np.testing.assert_allclose(probabilities, expected["probabilities"], atol=1e-6)
    run_id = versions.run_of(versions.get("eurosat", version))
    for label, energy, answer in zip(COLOURS, expected["energy"], answers, strict=True):
        assert answer["label"] == label
        assert answer["confidence"] == answer["probabilities"][label]
        assert answer["prediction_set"] == [label], "the only one above 0.1"
        score = energy - float(str(CALIBRATION["ood_threshold"]))
        assert answer["ood_score"] == pytest.approx(score, abs=1e-5)
        assert answer["out_of_distribution"] == (score > 0)
        assert answer["model_version"] == version
        assert answer["run_id"] == run_id
        assert answer["data_fingerprint"] == TAGS["data.fingerprint"]
        assert "resized_from" not in answer


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "application/octet-stream"])
def test_an_image_needs_no_media_type(pair: Server, kind: str) -> None:
    answer = requests.post(
        f"{pair.url}/predict",
        data=encoded("Forest"),
        headers={"Content-Type": kind},
        timeout=TIMEOUT_S,
    )
    assert answer.json()["label"] == "Forest"
    untyped = requests.post(f"{pair.url}/predict", data=encoded("Forest"), timeout=TIMEOUT_S)
    assert untyped.json()["label"] == "Forest"


def test_an_image_of_another_size_is_resized_and_the_answer_has_its_size(pair: Server) -> None:
    answer = predict(pair.url, encoded("SeaLake", "JPEG", size=100)).json()
    assert answer["label"] == "SeaLake"
    assert answer["resized_from"] == [100, 100]


def test_top_k_returns_the_highest_probabilities_first(pair: Server) -> None:
    tile = encoded("River", "JPEG")
    complete = predict(pair.url, tile).json()["probabilities"]
    two = predict(pair.url, tile, "?top_k=2").json()["probabilities"]
    assert list(complete) == CLASSES
    assert list(two) == sorted(complete, key=lambda name: -complete[name])[:2]
    answer = requests.post(
        f"{pair.url}/invocations", json=files(tile) | {"params": {"top_k": 2}}, timeout=TIMEOUT_S
    )
    assert answer.json()["predictions"][0]["probabilities"] == two


def test_tta_is_as_in_the_evaluation_unless_it_is_requested(pair: Server, tmp_path: Path) -> None:
    tile = saved(Image.fromarray(halves()), "PNG")
    for query, tta in (("", False), ("?tta=false", False), ("?tta=true", True), ("?tta=1", True)):
        expected = run_onnx(tmp_path, halves(), tta=tta)["probabilities"][0]
        answer = predict(pair.url, tile, query).json()
        np.testing.assert_allclose(list(answer["probabilities"].values()), expected, atol=1e-6)
        assert answer["label"] == ("River" if tta else "Forest")


def test_explain_adds_the_activation_map(pair: Server, tmp_path: Path) -> None:
    answer = predict(pair.url, saved(Image.fromarray(halves()), "PNG"), "?explain=true").json()
    expected = run_onnx(tmp_path, halves())["activation"][0][CLASSES.index("Forest")]
    np.testing.assert_allclose(answer["activation"], expected / expected.max(), atol=1e-4)
    assert "activation" not in predict(pair.url, encoded(kind="JPEG")).json()


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?top_k=4", "ask for 1 to 3 classes"),
        ("?top_k=-1", "top_k has a malformed value: the options are top_k=NUMBER"),
        ("?top_k=two", "top_k has a malformed value: the options are top_k=NUMBER"),
        ("?tta=perhaps", "tta=true|false"),
        ("?SECRET=1", "unknown option: the options are top_k=NUMBER"),
        ("?topk=2", "unknown option topk, did you mean top_k?"),
    ],
)
def test_malformed_options_are_rejected(pair: Server, query: str, message: str) -> None:
    error = rejection(predict(pair.url, encoded(kind="JPEG"), query), 422)
    assert message in error
    assert "SECRET" not in error


@pytest.mark.parametrize(
    ("method", "path", "kind", "body", "status"),
    [
        ("GET", "/nowhere", "", b"", 404),
        ("GET", "/predict", "", b"", 405),
        ("POST", "/ready", "", b"", 405),
        ("POST", "/predict", "text/html", b"SECRET", 415),
        ("POST", "/predict", "image/jpeg", b"SECRET", 422),
        ("POST", "/predict", "image/png", b"", 422),
        ("POST", "/predict", "multipart/form-data", b"SECRET", 400),
        ("POST", "/predict", "multipart/form-data; boundary=x", b"--x--\r\n", 422),
        ("POST", "/predict/batch", "application/json", b"SECRET", 400),
        ("POST", "/predict/batch", "application/json", b'{"images": [3]}', 400),
        ("POST", "/predict/batch", "application/json", b'{"images": []}', 422),
        ("POST", "/predict/batch", "application/json", b'{"images": ["SECRET!"]}', 422),
        ("POST", "/predict/batch", "image/jpeg", b"", 415),
        ("POST", "/invocations", "application/json", b"SECRET", 400),
        ("POST", "/invocations", "text/html", b"SECRET", 415),
        ("POST", "/invocations", "application/json", b'{"inputs": ["SECRETSECRET"]}', 422),
    ],
)
def test_errors_have_one_shape_and_do_not_repeat_the_payload(
    pair: Server, method: str, path: str, kind: str, body: bytes, status: int
) -> None:
    headers = {"Content-Type": kind} if kind else {}
    answer = requests.request(method, f"{pair.url}{path}", data=body, headers=headers, timeout=30)
    assert "SECRET" not in rejection(answer, status)


def test_routes_of_the_state_and_of_mlflow(pair: Server, version: str) -> None:
    ready = requests.get(f"{pair.url}/ready", timeout=TIMEOUT_S)
    assert (ready.status_code, ready.json()["model_version"]) == (200, version)
    model = requests.get(f"{pair.url}/model", timeout=TIMEOUT_S).json()
    assert model["follows"] == "models:/eurosat@champion"
    assert model["uri"] == f"models:/eurosat/{version}"
    assert model["run_id"] == versions.run_of(versions.get("eurosat", version))
    assert (model["precision"], model["classes"]) == ("fp32", CLASSES)
    assert model["tile"] == {"height": 64, "width": 64, "bands": 3}
    assert (model["swaps"], model["refused"]) == (0, {})
    assert requests.get(f"{pair.url}/ping", timeout=TIMEOUT_S).status_code == 200
    assert requests.get(f"{pair.url}/health", timeout=TIMEOUT_S).status_code == 200
    assert requests.get(f"{pair.url}/version", timeout=TIMEOUT_S).text.startswith("3.")


def test_the_openapi_document_has_every_route(pair: Server) -> None:
    document = requests.get(f"{pair.url}/openapi.json", timeout=TIMEOUT_S).json()
    assert document == openapi_schema()
    for path, methods in document["paths"].items():
        for method in methods:
            answer = requests.request(method, f"{pair.url}{path}", timeout=30)
            assert answer.status_code not in (404, 405), f"{method} {path}"


def test_the_metrics_are_the_sum_of_both_processes(pair: Server) -> None:
    """The kernel gives the connection of each request to one of the processes."""
    before = pair.metric("eurosat_requests_total"), pair.metric("eurosat_tiles_total")
    for label in ["River"] * 30 + ["Forest"] * 10:
        assert predict(pair.url, encoded(label, "JPEG")).json()["label"] == label
    after = pair.metric("eurosat_requests_total"), pair.metric("eurosat_tiles_total")
    num_requests = 40 + 2  # /metrics does not count the request that it answers
    assert (after[0] - before[0], after[1] - before[1]) == (num_requests, 40)
    assert pair.metric("eurosat_model") == 2
    workers = [child.pid for child in psutil.Process(pair.process.pid).children()]
    assert len(workers) == 2
    folder = environment_of(workers[0])["PROMETHEUS_MULTIPROC_DIR"]
    counters = {file.name for file in Path(folder).glob("counter_*.db")}
    assert counters >= {f"counter_{pid}.db" for pid in workers}


def environment_of(pid: int) -> dict[str, str]:
    return dict(psutil.Process(pid).environ())


def test_a_killed_process_is_restarted(pair: Server) -> None:
    """The other process answers meanwhile."""
    parent = psutil.Process(pair.process.pid)
    old = {child.pid for child in parent.children()}
    victim = min(old)
    psutil.Process(victim).kill()
    until(lambda: not psutil.pid_exists(victim), 10, "the process is killed")

    def restarted() -> bool:
        assert predict(pair.url, encoded("River", "JPEG")).json()["label"] == "River"
        now = {child.pid for child in parent.children()}
        return len(now) == 2 and victim not in now and pair.metric("eurosat_model") == 2

    until(restarted, 60, "another process in its place")


def test_keys_are_required(strict: Server, secrets: dict[str, str]) -> None:
    tile, team = encoded("River", "JPEG"), secrets["team"]
    for headers in ({}, {"x-api-key": "SECRET"}, {"Authorization": f"Basic {team}"}):
        answer = predict(strict.url, tile, **headers)
        assert "SECRET" not in rejection(answer, 401)
        assert answer.headers["www-authenticate"] == "Bearer"
    for headers in ({"Authorization": f"Bearer {team}"}, {"x-api-key": team}):
        assert predict(strict.url, tile, **headers).json()["label"] == "River"
    rejection(requests.get(f"{strict.url}/model", timeout=TIMEOUT_S), 401)
    rejection(requests.post(f"{strict.url}/invocations", json=files(tile), timeout=TIMEOUT_S), 401)
    for path in ("/ready", "/ping", "/health", "/version", "/metrics", "/openapi.json"):
        assert requests.get(f"{strict.url}{path}", timeout=TIMEOUT_S).status_code == 200


def test_the_rate_of_a_key_does_not_limit_other_keys(
    strict: Server, secrets: dict[str, str]
) -> None:
    tile = encoded("River", "JPEG")
    assert predict(strict.url, tile, x_api_key=secrets["visitor"]).status_code == 200
    error = rejection(predict(strict.url, tile, x_api_key=secrets["visitor"]), 429)
    assert "the key visitor exceeds its rate" in error
    assert predict(strict.url, tile, x_api_key=secrets["team"]).status_code == 200


def test_the_client_takes_its_key_from_the_environment(
    strict: Server, secrets: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(client.ServerError, match="answered 401: send an API key"):
        client.score(strict.url, {"tile": encoded()})
    monkeypatch.setenv(client.KEY_VARIABLE, secrets["team"])
    (answer,) = client.score(strict.url, {"tile": encoded("SeaLake")})
    assert answer["label"] == "SeaLake"
    with pytest.raises(client.ServerError, match="answered 422: bad.png: 3 bytes that are not"):
        client.score(strict.url, {"tile": encoded(), "bad.png": b"abc"})


def test_the_client_predicts_the_other_files_of_a_batch_with_bad_ones(
    pair: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, text, missing = (tmp_path / name for name in ("good.png", "notes.txt", "missing.png"))
    good.write_bytes(encoded("SeaLake"))
    text.write_bytes(b"not a tile")
    files = [str(file) for file in (text, missing, good, text)]
    assert client.main(["--url", pair.url, *files]) == exit_codes.NEGATIVE
    output = capsys.readouterr()
    [line] = output.out.splitlines()
    assert '"label": "SeaLake"' in line
    faults = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert len(faults) == 2
    assert "missing.png cannot be read" in faults[0]
    assert "notes.txt: 10 bytes that are not a JPEG, PNG or TIFF file" in faults[1]


def test_a_browser_at_the_address_gets_the_routes(pair: Server) -> None:
    index = requests.get(f"{pair.url}/", timeout=TIMEOUT_S).json()
    assert index["serves"] == "models:/eurosat@champion"
    assert "POST /predict" in index["routes"]
    assert (
        requests.get(f"{pair.url}{index['documentation']}", timeout=TIMEOUT_S).json()
        == openapi_schema()
    )


def test_a_tile_that_curl_d_changed_is_answered_with_the_right_option(pair: Server) -> None:
    changed = encoded("Forest", "JPEG")[:300]
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = requests.post(f"{pair.url}/predict", data=changed, headers=form, timeout=TIMEOUT_S)
    assert "with curl use --data-binary, since -d changes" in rejection(answer, 422)
    assert "curl" not in rejection(predict(pair.url, changed), 422)
    unknown = requests.post(
        f"{pair.url}/predict?topk=2", data=encoded(), headers=form, timeout=TIMEOUT_S
    )
    assert rejection(unknown, 422).startswith("unknown option topk, did you mean top_k?")


def test_the_log_does_not_call_every_message_of_uvicorn_an_error(pair: Server) -> None:
    lines = pair.log.read_text()
    assert "uvicorn: " in lines
    assert "uvicorn.error" not in lines


def test_a_body_over_the_limit_is_not_read(strict: Server, bearer: dict[str, str]) -> None:
    large = b"\xff" * (BODY_MB * 1_000_000 + 1)
    assert "a body over the limit of 2 MB" in rejection(predict(strict.url, large, **bearer), 413)
    chunks = (large[start : start + 65_536] for start in range(0, len(large), 65_536))
    headers = bearer | {"Content-Type": "image/jpeg"}
    answer = requests.post(f"{strict.url}/predict", data=chunks, headers=headers, timeout=30)
    assert "a body over the limit of 2 MB" in rejection(answer, 413)


def test_more_tiles_than_the_limit_of_a_request_are_rejected(
    strict: Server, bearer: dict[str, str]
) -> None:
    tile = encoded("River", "JPEG")
    texts = [base64.b64encode(tile).decode()] * (TILES + 1)
    url = f"{strict.url}/predict/batch"
    answer = requests.post(url, json={"images": texts}, headers=bearer, timeout=TIMEOUT_S)
    assert f"send 1 to {TILES}" in rejection(answer, 413)
    answer = requests.post(
        url, files=[("files", tile)] * (TILES + 1), headers=bearer, timeout=TIMEOUT_S
    )
    assert f"send 1 to {TILES}" in rejection(answer, 413)
    two = requests.post(
        f"{strict.url}/predict", files=[("files", tile)] * 2, headers=bearer, timeout=TIMEOUT_S
    )
    assert "send 1 to 1" in rejection(two, 413)
    at_the_limit = requests.post(
        url, json={"images": texts[:TILES]}, headers=bearer, timeout=TIMEOUT_S
    ).json()
    assert [prediction["label"] for prediction in at_the_limit["predictions"]] == ["River"] * TILES


@contextlib.contextmanager
def busy(strict: Server, bearer: dict[str, str], tiles: int) -> Iterator[None]:
    """Run the block while the server predicts large tiles; check their predictions afterwards."""
    large = saved(Image.new("RGB", (1024, 1024), COLOURS["River"]), "PNG")
    answers: list[requests.Response] = []

    def send() -> None:
        sent = [("files", large)] * tiles
        answers.append(
            requests.post(
                f"{strict.url}/predict/batch", files=sent, headers=bearer, timeout=TIMEOUT_S
            )
        )

    thread = threading.Thread(target=send)
    thread.start()
    try:
        until(lambda: strict.metric("eurosat_tiles_waiting") > tiles * 0.75, 20, "a full queue")
        yield
    finally:
        thread.join()
    assert answers[0].status_code == 200, answers[0].text[:500]
    assert len(answers[0].json()["predictions"]) == tiles


def test_a_client_may_shorten_the_deadline(strict: Server, bearer: dict[str, str]) -> None:
    """Runs before the queue is full for the first time, after which it is shorter."""
    tile = encoded(kind="JPEG")
    for header in ("soon", "0", "-1", "nan"):
        answer = predict(strict.url, tile, **bearer, x_request_timeout=header)
        assert "takes seconds above 0" in rejection(answer, 422)
    with busy(strict, bearer, QUEUE - 2):
        answer = predict(strict.url, tile, **bearer, x_request_timeout="0.02")
        assert "the deadline passed" in rejection(answer, 429)
    assert predict(strict.url, tile, **bearer, x_request_timeout="5").status_code == 200


def test_a_full_queue_rejects_tiles(strict: Server, bearer: dict[str, str]) -> None:
    with busy(strict, bearer, TILES):
        answer = predict(strict.url, encoded(kind="JPEG"), **bearer)
        by_mlflow = requests.post(
            f"{strict.url}/invocations", json=files(), headers=bearer, timeout=TIMEOUT_S
        )
        assert "tiles wait" in rejection(answer, 429)
        assert "tiles wait" in rejection(by_mlflow, 429)
    assert predict(strict.url, encoded(kind="JPEG"), **bearer).status_code == 200


def test_a_rejected_request_keeps_its_connection(strict: Server, bearer: dict[str, str]) -> None:
    tile = encoded(kind="JPEG")
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(tile)}\r\n"
    head += "Content-Type: image/jpeg\r\n" + "".join(f"{k}: {v}\r\n" for k, v in bearer.items())
    request = head.encode() + b"\r\n" + tile
    rejected = r'eurosat_requests_total\{path="/predict",status="429"\}'
    before = strict.metric(rejected)
    address = ("127.0.0.1", strict.port)
    with socket.create_connection(address, 30) as sent, sent.makefile("rb") as answers:
        with busy(strict, bearer, TILES):
            for parts in ([request], [request[:9], request[9:-9], request[-9:]], [request * 2]):
                for part in parts:
                    sent.sendall(part)
                    time.sleep(0.02)
                for _ in range(b"".join(parts).count(head.encode())):
                    assert status_of(answers) == 429
        sent.sendall(request)
        assert status_of(answers) == 200
        assert strict.metric(rejected) == before + 4
        with busy(strict, bearer, TILES):
            sent.sendall(request.replace(b"Host: x", b"Connection: close", 1))
            assert status_of(answers) == 429
            assert answers.read() == b""


def test_a_connection_is_kept_after_an_answer_before_the_body(strict: Server) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    address = ("127.0.0.1", strict.port)
    with socket.create_connection(address, 30) as sent, sent.makefile("rb") as answers:
        for _ in range(2):
            sent.sendall(head)  # without a key
            assert status_of(answers) == 401
            sent.sendall(b"x" * 50)
            sent.sendall(b"x" * 50)
            time.sleep(0.05)
        broken = b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        sent.sendall(broken)
        assert status_of(answers) == 401
        sent.sendall(b"SECRET")
        assert answers.read() == b"", "one answer to each request"


def test_a_malformed_chunk_is_rejected_at_once(strict: Server, bearer: dict[str, str]) -> None:
    head = "POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    head += "Content-Type: image/jpeg\r\n" + "".join(f"{k}: {v}\r\n" for k, v in bearer.items())
    for broken in (b"SECRET\r\n", b"0\r\nX: " + b"x" * 40_000, b"1\r\nx\r\n" * 40_000):
        with socket.create_connection(("127.0.0.1", strict.port), 30) as sent:
            sent.sendall(head.encode() + b"\r\n")
            time.sleep(0.05)
            with contextlib.suppress(ConnectionError):
                for start in range(0, len(broken), 9999):
                    sent.sendall(broken[start : start + 9999])
            sent.settimeout(3.0)  # less than the limit for a body
            with sent.makefile("rb") as answers, contextlib.suppress(ConnectionResetError):
                assert status_of(answers) in (400, 431)
                assert answers.read() == b""


def status_of(answers: BinaryIO) -> int:
    """Read the next answer, and return its status."""
    answer = read_answer(answers)
    assert answer is not None, "the connection was closed"
    return answer.status


def test_requests_in_flight_are_answered_when_the_server_is_stopped(
    store: Path, version: str
) -> None:
    tile = encoded("SeaLake", "JPEG")
    with running(store) as server:
        connections = [http.client.HTTPConnection("127.0.0.1", server.port) for _ in range(8)]
        for connection in connections:
            connection.putrequest("POST", "/predict")
            connection.putheader("Content-Type", "image/jpeg")
            connection.putheader("Content-Length", str(len(tile)))
            connection.endheaders(tile[:100])
        until(
            lambda: server.metric("eurosat_requests_open") == len(connections) + 1,
            10,
            "the requests in flight, and the one to /metrics, are open",
        )
        server.process.terminate()

        def stopped_listening() -> bool:
            try:
                requests.get(f"{server.url}/ready", timeout=5)
            except requests.RequestException:
                return True
            return False

        until(stopped_listening, 10, "the server stops listening")
        assert server.process.poll() is None
        for connection in connections:
            connection.send(tile[100:])
        answers = [connection.getresponse() for connection in connections]
        assert [answer.status for answer in answers] == [200] * len(connections)
        assert all(b'"label": "SeaLake"' in answer.read() for answer in answers)
        assert server.process.wait(timeout=10) == 0
    assert "killed" not in server.log.read_text()


def test_malformed_flags_fail_in_one_line(
    pair: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    errors = {
        ("--host", "0.0.0.0"): "0.0.0.0 can be reached by others: give --keys FILE",
        ("--port", str(pair.port)): "cannot listen on",
        ("--processes", "0"): "--processes must be above 0",
        ("--max-queue", "0"): "queue must be above 0",
        ("--max-deadline-s", "nan"): "deadline_s must be above 0",
    }
    for flags, message in errors.items():
        assert fails(server.main, *flags) == 2
        assert message in last_error(capfd)


def test_a_worker_that_exits_for_bad_input_ends_the_server(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["serving.server", "--port", str(free_port()), "--processes", "1"]
    ended = processes.run(*command, "--keys", str(tmp_path / "none.txt"))
    assert ended.returncode == 2
    assert "none.txt cannot be read: create it with `python -m serving.keys NAME`" in ended.stderr


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("tiles.example", False),
    ],
)
def test_loopback_addresses_are_recognised(host: str, expected: bool) -> None:
    assert server.is_loopback(host) == expected


def test_limits_are_divided_among_processes() -> None:
    share = Limits(queue=128, requests=3).shared(4)
    assert (share.queue, share.requests, share.tiles) == (32, 1 + 3, Limits().tiles)
    assert Limits().shared(1) == Limits()


@pytest.mark.parametrize("processes", [2, 4, 16])
def test_a_process_takes_its_share_however_the_kernel_spreads_the_connections(
    processes: int,
) -> None:
    share = Limits(queue=128, requests=512).shared(processes)
    rng = np.random.default_rng(0)
    for total, room in ((128, share.queue + share.uneven), (512, share.requests)):
        connections = rng.multinomial(total, [1 / processes] * processes, size=10_000)
        assert (connections.max(axis=1) > room).mean() < 0.005


def test_a_token_bucket_is_refilled(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("serving.limits.time", SimpleNamespace(monotonic=lambda: now))
    bucket = TokenBucket(2)
    assert [bucket.take() for _ in range(3)] == [True, True, False]
    now += 0.5
    assert [bucket.take() for _ in range(2)] == [True, False]
    now += 1000
    assert [bucket.take() for _ in range(3)] == [True, True, False]


def test_a_key_is_printed_once_and_stored_as_a_hash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.txt"
    assert keys.main(["team", "--file", str(file), "--per-second", "3"]) == 0
    key = capsys.readouterr().out.strip()
    assert len(key) >= 43, "of 32 random bytes"
    assert key not in file.read_text()
    assert file.read_text() == f"team {hashlib.sha256(key.encode()).hexdigest()} 3\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert keys.KeyRing(file).admit({"x-api-key": key}) == "team"


def test_a_key_file_becomes_readable_by_its_owner_only(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    file.write_text("# who may ask\n\n")
    file.chmod(0o644)
    first, second = (keys.create(file, name, 1) for name in ("one", "two"))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    ring = keys.KeyRing(file)
    assert [ring.admit({"authorization": f"bearer {key}"}) for key in (first, second)] == [
        "one",
        "two",
    ]
    with pytest.raises(RequestRejected, match="send an API key"):
        ring.admit({"authorization": "bearer "})


def test_keys_that_are_added_and_removed_count_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keys, "RELOAD_INTERVAL_S", 0.0)
    file = tmp_path / "keys.txt"
    first = keys.create(file, "one", 1)
    ring = keys.KeyRing(file)
    assert ring.admit({"x-api-key": first}) == "one"
    second = keys.create(file, "two", 5)
    assert ring.admit({"x-api-key": second}) == "two"
    with pytest.raises(RequestRejected, match="exceeds its rate"):
        ring.admit({"x-api-key": first})  # its rate goes on
    good = file.read_text()
    file.write_text("no line of keys\n")
    assert ring.admit({"x-api-key": second}) == "two"
    assert "the API keys stay as they were" in caplog.text
    file.write_text("".join(good.splitlines(keepends=True)[-1:]))
    with pytest.raises(RequestRejected, match="send an API key"):
        ring.admit({"x-api-key": first})


@pytest.mark.parametrize(
    ("name", "rate_per_s", "message"),
    [
        ("one", 1.0, "already has a key one"),
        ("a b", 1.0, "a key's name is 1 to 64 letters"),
        ("two", 0.0, "--per-second must be above 0"),
        ("two", float("nan"), "--per-second must be above 0"),
    ],
)
def test_a_key_with_a_malformed_name_or_rate_is_not_created(
    tmp_path: Path, name: str, rate_per_s: float, message: str
) -> None:
    file = tmp_path / "keys.txt"
    keys.create(file, "one", 1)
    before = file.read_text()
    with pytest.raises(ConfigError, match=message):
        keys.create(file, name, rate_per_s)
    assert file.read_text() == before


@pytest.mark.parametrize(
    "line",
    [
        "team",
        f"team {'0' * 63} 1",
        f"team {'é' * 64} 1",
        f"team {'0' * 64} 0",
        f"team {'0' * 64} inf",
    ],
)
def test_a_malformed_line_of_a_key_file_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "keys.txt"
    file.write_text(f"# keys\n{line}\n")
    with pytest.raises(ConfigError, match=r"keys.txt:2 is not a line of name, sha256 and requests"):
        keys.KeyRing(file)
