"""``python -m serving.server`` itself, asked over REST."""

import base64
import contextlib
import hashlib
import http.client
import io
import os
import socket
import stat
import subprocess
import sys
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
from registry import versions
from serving import client, keys, server
from serving.app import document
from serving.errors import Refused
from serving.limits import Bucket, Limits
from tests.support.commands import fails, last_error
from tests.support.images import COLOURS, encoded, files, raw, saved
from tests.support.mlflow_server import free_port
from tests.support.paths import ROOT
from tests.support.registry import CLASSES, REGISTRY, TAGS
from tests.support.serving import (
    CALIBRATION,
    Server,
    make_champion,
    make_whole_network,
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
    """Two processes."""
    with running(store, processes=2) as server:
        yield server


@pytest.fixture(scope="module")
def secrets(store: Path) -> dict[str, str]:
    """Keys by name: one may ask as often as it likes, one every ten seconds."""
    return {name: keys.create(store / "keys.txt", name, at) for name, at in KEYS.items()}


KEYS = {"team": 10_000.0, "visitor": 0.1}


@pytest.fixture(scope="module")
def strict(store: Path, version: str, secrets: dict[str, str]) -> Iterator[Server]:
    """One process, which asks for keys, answers tile by tile, and takes little."""
    flags = ["--keys", "keys.txt", "--max-queue", str(QUEUE), "--max-tiles", str(TILES)]
    flags += ["--max-body-mb", str(BODY_MB), "--max-batch", "1"]
    with running(store, *flags) as server:
        yield server


@pytest.fixture
def bearer(secrets: dict[str, str]) -> dict[str, str]:
    return {"Authorization": f"Bearer {secrets['team']}"}


def halves() -> npt.NDArray[np.uint8]:
    """Forest on the left; on the right, and over all of it, a river."""
    tile = np.full((64, 64, 3), (90, 30, 20), np.uint8)
    tile[:, 32:] = (10, 250, 20)
    return tile


def of_onnx_runtime(folder: Path, *tiles: npt.NDArray[np.uint8], tta: bool = False) -> Any:
    network = make_whole_network(folder / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(network, options)
    given = {"tiles_NHWC": np.stack(tiles), "tta": np.array(tta)}
    names = ["probabilities", "energy", "activation"]
    return dict(zip(names, session.run(names, given), strict=True))


def predict(url: str, picture: bytes, query: str = "", **headers: str) -> requests.Response:
    sent = {"Content-Type": "image/jpeg"} | {k.replace("_", "-"): v for k, v in headers.items()}
    return requests.post(f"{url}/predict{query}", data=picture, headers=sent, timeout=30)


def refused(answer: requests.Response, status: int) -> str:
    """What it says; every refusal has the one shape."""
    assert answer.status_code == status, answer.text[:500]
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"error_code", "message"}
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    return str(answer.json()["message"])


def by_body(url: str, kind: str, pictures: list[bytes]) -> list[dict[str, Any]]:
    headers = {"Content-Type": f"image/{kind.lower()}"}
    answers = [requests.post(f"{url}/predict", data=one, headers=headers) for one in pictures]
    return [answer.json() for answer in answers]


def by_form(url: str, kind: str, pictures: list[bytes]) -> list[dict[str, Any]]:
    answers = [requests.post(f"{url}/predict", files={"file": one}) for one in pictures]
    return [answer.json() for answer in answers]


def by_batch_of_files(url: str, kind: str, pictures: list[bytes]) -> list[dict[str, Any]]:
    sent = [("files", (f"{number}", one)) for number, one in enumerate(pictures)]
    told = requests.post(f"{url}/predict/batch", files=sent).json()
    return list(told["predictions"])


def by_batch_of_base64(url: str, kind: str, pictures: list[bytes]) -> list[dict[str, Any]]:
    texts = [base64.b64encode(one).decode() for one in pictures]
    told = requests.post(f"{url}/predict/batch", json={"images": texts}).json()
    return list(told["predictions"])


def by_invocations(url: str, kind: str, pictures: list[bytes]) -> list[dict[str, Any]]:
    told = requests.post(f"{url}/invocations", json=files(*pictures)).json()
    return list(told["predictions"])


def by_pixels(url: str, kind: str, pictures: list[bytes]) -> list[dict[str, Any]]:
    tiles = [np.asarray(Image.open(io.BytesIO(one))) for one in pictures]
    return list(requests.post(f"{url}/invocations", json=raw(*tiles)).json()["predictions"])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize(
    "ask",
    [by_body, by_form, by_batch_of_files, by_batch_of_base64, by_invocations, by_pixels],
)
def test_every_way_answers_what_onnx_runtime_does(
    pair: Server,
    version: str,
    tmp_path: Path,
    kind: str,
    ask: Callable[[str, str, list[bytes]], list[dict[str, Any]]],
) -> None:
    pictures = [encoded(label, kind) for label in COLOURS]
    tiles = [np.asarray(Image.open(io.BytesIO(one))) for one in pictures]
    expected = of_onnx_runtime(tmp_path, *tiles)
    answers = ask(pair.url, kind, pictures)
    told = [list(answer["probabilities"].values()) for answer in answers]
    np.testing.assert_allclose(told, expected["probabilities"], atol=1e-6)
    run_id = versions.run_of(versions.get("eurosat", version))
    for label, energy, answer in zip(COLOURS, expected["energy"], answers, strict=True):
        assert answer["label"] == label
        assert answer["confidence"] == answer["probabilities"][label]
        assert answer["prediction_set"] == [label], "the only one above 0.1"
        score = energy - float(str(CALIBRATION["ood_threshold"]))
        assert answer["unlike_score"] == pytest.approx(score, abs=1e-5)
        assert answer["unlike_training"] == (score > 0)
        assert answer["model_version"] == version
        assert answer["run_id"] == run_id
        assert answer["data_fingerprint"] == TAGS["data.fingerprint"]
        assert "resized_from" not in answer


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "application/octet-stream"])
def test_a_picture_need_not_be_announced(pair: Server, kind: str) -> None:
    answer = requests.post(
        f"{pair.url}/predict", data=encoded("Forest"), headers={"Content-Type": kind}
    )
    assert answer.json()["label"] == "Forest"
    untold = requests.post(f"{pair.url}/predict", data=encoded("Forest"))
    assert untold.json()["label"] == "Forest"


def test_a_picture_of_another_size_is_resized_and_the_answer_says_so(pair: Server) -> None:
    answer = predict(pair.url, encoded("SeaLake", "JPEG", size=100)).json()
    assert answer["label"] == "SeaLake"
    assert answer["resized_from"] == [100, 100]


def test_top_k_tells_the_likeliest_first(pair: Server) -> None:
    tile = encoded("River", "JPEG")
    everything = predict(pair.url, tile).json()["probabilities"]
    two = predict(pair.url, tile, "?top_k=2").json()["probabilities"]
    assert list(everything) == CLASSES
    assert list(two) == sorted(everything, key=lambda name: -everything[name])[:2]
    told = requests.post(f"{pair.url}/invocations", json=files(tile) | {"params": {"top_k": 2}})
    assert told.json()["predictions"][0]["probabilities"] == two


def test_tta_is_as_the_model_was_judged_unless_it_is_said(pair: Server, tmp_path: Path) -> None:
    tile = saved(Image.fromarray(halves()), "PNG")
    for query, tta in (("", False), ("?tta=false", False), ("?tta=true", True), ("?tta=1", True)):
        expected = of_onnx_runtime(tmp_path, halves(), tta=tta)["probabilities"][0]
        answer = predict(pair.url, tile, query).json()
        np.testing.assert_allclose(list(answer["probabilities"].values()), expected, atol=1e-6)
        assert answer["label"] == ("River" if tta else "Forest")


def test_explain_tells_where_it_looked(pair: Server, tmp_path: Path) -> None:
    answer = predict(pair.url, saved(Image.fromarray(halves()), "PNG"), "?explain=true").json()
    expected = of_onnx_runtime(tmp_path, halves())["activation"][0][CLASSES.index("Forest")]
    np.testing.assert_allclose(answer["activation"], expected / expected.max(), atol=1e-4)
    assert "activation" not in predict(pair.url, encoded(kind="JPEG")).json()


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("?top_k=4", "ask for 1 to 3 classes"),
        ("?top_k=-1", "the query takes top_k=NUMBER"),
        ("?top_k=two", "the query takes top_k=NUMBER"),
        ("?tta=perhaps", "tta=true|false"),
        ("?SECRET=1", "the query takes"),
    ],
)
def test_parameters_that_cannot_be_are_refused(pair: Server, query: str, said: str) -> None:
    told = refused(predict(pair.url, encoded(kind="JPEG"), query), 422)
    assert said in told
    assert "SECRET" not in told


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
def test_refusals_have_one_shape_and_no_echo(
    pair: Server, method: str, path: str, kind: str, body: bytes, status: int
) -> None:
    headers = {"Content-Type": kind} if kind else {}
    answer = requests.request(method, f"{pair.url}{path}", data=body, headers=headers, timeout=30)
    assert "SECRET" not in refused(answer, status)


def test_ready_model_and_mlflows_own_routes(pair: Server, version: str) -> None:
    ready = requests.get(f"{pair.url}/ready")
    assert (ready.status_code, ready.json()["model_version"]) == (200, version)
    model = requests.get(f"{pair.url}/model").json()
    assert model["follows"] == "models:/eurosat@champion"
    assert model["uri"] == f"models:/eurosat/{version}"
    assert model["run_id"] == versions.run_of(versions.get("eurosat", version))
    assert (model["form"], model["classes"]) == ("fp32", CLASSES)
    assert model["tile"] == {"height": 64, "width": 64, "bands": 3}
    assert (model["swaps"], model["refused"]) == (0, {})
    assert requests.get(f"{pair.url}/ping").status_code == 200
    assert requests.get(f"{pair.url}/health").status_code == 200
    assert requests.get(f"{pair.url}/version").text.startswith("3.")


def test_the_document_tells_of_every_route(pair: Server) -> None:
    told = requests.get(f"{pair.url}/openapi.json").json()
    assert told == document()
    for path, methods in told["paths"].items():
        for method in methods:
            answer = requests.request(method, f"{pair.url}{path}", timeout=30)
            assert answer.status_code not in (404, 405), f"{method} {path}"


def test_both_processes_count_together(pair: Server) -> None:
    """Each request is a connection of its own, which the kernel hands to either."""
    before = pair.counted("eurosat_requests_total"), pair.counted("eurosat_tiles_total")
    for label in ["River"] * 30 + ["Forest"] * 10:
        assert predict(pair.url, encoded(label, "JPEG")).json()["label"] == label
    after = pair.counted("eurosat_requests_total"), pair.counted("eurosat_tiles_total")
    asked = 40 + 2  # what /metrics told last did not count itself
    assert (after[0] - before[0], after[1] - before[1]) == (asked, 40)
    assert pair.counted("eurosat_model") == 2
    workers = [child.pid for child in psutil.Process(pair.process.pid).children()]
    assert len(workers) == 2
    folder = environment_of(workers[0])["PROMETHEUS_MULTIPROC_DIR"]
    counters = {file.name for file in Path(folder).glob("counter_*.db")}
    assert counters >= {f"counter_{pid}.db" for pid in workers}


def environment_of(pid: int) -> dict[str, str]:
    return dict(psutil.Process(pid).environ())


def test_a_process_that_is_killed_is_started_again(pair: Server) -> None:
    """The other one answers meanwhile."""
    parent = psutil.Process(pair.process.pid)
    old = {child.pid for child in parent.children()}
    victim = min(old)
    psutil.Process(victim).kill()
    until(lambda: not psutil.pid_exists(victim), 10, "the end of the killed process")

    def again() -> bool:
        assert predict(pair.url, encoded("River", "JPEG")).json()["label"] == "River"
        now = {child.pid for child in parent.children()}
        return len(now) == 2 and victim not in now and pair.counted("eurosat_model") == 2

    until(again, 60, "another process in its place")


def test_keys_are_asked_for(strict: Server, secrets: dict[str, str]) -> None:
    tile, team = encoded("River", "JPEG"), secrets["team"]
    for headers in ({}, {"x-api-key": "SECRET"}, {"Authorization": f"Basic {team}"}):
        answer = predict(strict.url, tile, **headers)
        assert "SECRET" not in refused(answer, 401)
        assert answer.headers["www-authenticate"] == "Bearer"
    for headers in ({"Authorization": f"Bearer {team}"}, {"x-api-key": team}):
        assert predict(strict.url, tile, **headers).json()["label"] == "River"
    refused(requests.get(f"{strict.url}/model"), 401)
    refused(requests.post(f"{strict.url}/invocations", json=files(tile)), 401)
    for path in ("/ready", "/ping", "/health", "/version", "/metrics", "/openapi.json"):
        assert requests.get(f"{strict.url}{path}").status_code == 200


def test_a_key_that_asks_too_often_waits_and_no_other_does(
    strict: Server, secrets: dict[str, str]
) -> None:
    tile = encoded("River", "JPEG")
    assert predict(strict.url, tile, x_api_key=secrets["visitor"]).status_code == 200
    said = refused(predict(strict.url, tile, x_api_key=secrets["visitor"]), 429)
    assert "the key visitor asks more often than it may" in said
    assert predict(strict.url, tile, x_api_key=secrets["team"]).status_code == 200


def test_the_client_takes_its_key_from_the_environment(
    strict: Server, secrets: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(client.ServerError, match="answered 401: send an API key"):
        client.score(strict.url, {"tile": encoded()})
    monkeypatch.setenv(client.KEY, secrets["team"])
    (answer,) = client.score(strict.url, {"tile": encoded("SeaLake")})
    assert answer["label"] == "SeaLake"
    with pytest.raises(client.ServerError, match="answered 422: bad.png: 3 bytes that are no"):
        client.score(strict.url, {"tile": encoded(), "bad.png": b"abc"})


def test_a_body_over_the_limit_is_not_read(strict: Server, bearer: dict[str, str]) -> None:
    large = b"\xff" * (BODY_MB * 1_000_000 + 1)
    assert "a body over 2 MB" in refused(predict(strict.url, large, **bearer), 413)
    in_parts = (large[start : start + 65_536] for start in range(0, len(large), 65_536))
    headers = bearer | {"Content-Type": "image/jpeg"}
    answer = requests.post(f"{strict.url}/predict", data=in_parts, headers=headers, timeout=30)
    assert "a body over 2 MB" in refused(answer, 413)


def test_more_tiles_than_one_request_may_bring_are_refused(
    strict: Server, bearer: dict[str, str]
) -> None:
    tile = encoded("River", "JPEG")
    texts = [base64.b64encode(tile).decode()] * (TILES + 1)
    url = f"{strict.url}/predict/batch"
    answer = requests.post(url, json={"images": texts}, headers=bearer)
    assert f"send 1 to {TILES}" in refused(answer, 413)
    answer = requests.post(url, files=[("files", tile)] * (TILES + 1), headers=bearer)
    assert f"send 1 to {TILES}" in refused(answer, 413)
    two = requests.post(f"{strict.url}/predict", files=[("files", tile)] * 2, headers=bearer)
    assert "send 1 to 1" in refused(two, 413)
    enough = requests.post(url, json={"images": texts[:TILES]}, headers=bearer).json()
    assert [one["label"] for one in enough["predictions"]] == ["River"] * TILES


@contextlib.contextmanager
def busy(strict: Server, bearer: dict[str, str], tiles: int) -> Iterator[None]:
    """While it answers so many tiles that take their time; they are all answered at the end."""
    large = saved(Image.new("RGB", (1024, 1024), COLOURS["River"]), "PNG")
    told: list[requests.Response] = []

    def ask() -> None:
        sent = [("files", large)] * tiles
        told.append(requests.post(f"{strict.url}/predict/batch", files=sent, headers=bearer))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        until(lambda: strict.counted("eurosat_tiles_waiting") > tiles * 0.75, 20, "a full queue")
        yield
    finally:
        asking.join()
    assert told[0].status_code == 200, told[0].text[:500]
    assert len(told[0].json()["predictions"]) == tiles


def test_a_client_says_how_long_it_waits(strict: Server, bearer: dict[str, str]) -> None:
    """Before the queue has ever been full, from when on less of it is used."""
    tile = encoded(kind="JPEG")
    for said in ("soon", "0", "-1", "nan"):
        answer = predict(strict.url, tile, **bearer, x_request_timeout=said)
        assert "takes seconds above 0" in refused(answer, 422)
    with busy(strict, bearer, QUEUE - 2):
        answer = predict(strict.url, tile, **bearer, x_request_timeout="0.02")
        assert "the time allowed had passed" in refused(answer, 429)
    assert predict(strict.url, tile, **bearer, x_request_timeout="5").status_code == 200


def test_a_full_queue_takes_no_more(strict: Server, bearer: dict[str, str]) -> None:
    with busy(strict, bearer, TILES):
        answer = predict(strict.url, encoded(kind="JPEG"), **bearer)
        by_mlflow = requests.post(f"{strict.url}/invocations", json=files(), headers=bearer)
        assert "tiles wait" in refused(answer, 429)
        assert "tiles wait" in refused(by_mlflow, 429)
    assert predict(strict.url, encoded(kind="JPEG"), **bearer).status_code == 200


def test_who_is_told_to_wait_keeps_the_connection(strict: Server, bearer: dict[str, str]) -> None:
    tile = encoded(kind="JPEG")
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(tile)}\r\n"
    head += "Content-Type: image/jpeg\r\n" + "".join(f"{k}: {v}\r\n" for k, v in bearer.items())
    whole = head.encode() + b"\r\n" + tile
    told = r'eurosat_requests_total\{path="/predict",status="429"\}'
    before = strict.counted(told)
    at = ("127.0.0.1", strict.port)
    with socket.create_connection(at, 30) as sent, sent.makefile("rb") as answers:
        with busy(strict, bearer, TILES):
            for parts in ([whole], [whole[:9], whole[9:-9], whole[-9:]], [whole * 2]):
                for part in parts:
                    sent.sendall(part)
                    time.sleep(0.02)
                for _ in range(b"".join(parts).count(head.encode())):
                    assert status_of(answers) == 429
        sent.sendall(whole)
        assert status_of(answers) == 200
        assert strict.counted(told) == before + 4
        with busy(strict, bearer, TILES):
            sent.sendall(whole.replace(b"Host: x", b"Connection: close", 1))
            assert status_of(answers) == 429
            assert answers.read() == b""


def test_a_connection_is_kept_through_what_is_refused_before_its_body(strict: Server) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    at = ("127.0.0.1", strict.port)
    with socket.create_connection(at, 30) as sent, sent.makefile("rb") as answers:
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
        assert answers.read() == b"", "one answer to one request"


def test_what_is_no_chunk_is_told_at_once(strict: Server, bearer: dict[str, str]) -> None:
    head = "POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    head += "Content-Type: image/jpeg\r\n" + "".join(f"{k}: {v}\r\n" for k, v in bearer.items())
    for broken in (b"SECRET\r\n", b"0\r\nX: " + b"x" * 40_000, b"1\r\nx\r\n" * 40_000):
        with socket.create_connection(("127.0.0.1", strict.port), 30) as sent:
            sent.sendall(head.encode() + b"\r\n")
            time.sleep(0.05)
            with contextlib.suppress(ConnectionError):
                for start in range(0, len(broken), 9999):
                    sent.sendall(broken[start : start + 9999])
            sent.settimeout(3.0)  # sooner than a body may take
            with sent.makefile("rb") as answers, contextlib.suppress(ConnectionResetError):
                assert status_of(answers) in (400, 431)
                assert answers.read() == b""


def status_of(answers: BinaryIO) -> int:
    """Of the next one, which is read to its end."""
    answer = read_answer(answers)
    assert answer is not None, "the connection was closed"
    return answer.status


def test_what_it_has_begun_is_answered_when_it_is_stopped(store: Path, version: str) -> None:
    tile = encoded("SeaLake", "JPEG")
    with running(store) as server:
        begun = [http.client.HTTPConnection("127.0.0.1", server.port) for _ in range(8)]
        for one in begun:
            one.putrequest("POST", "/predict")
            one.putheader("Content-Type", "image/jpeg")
            one.putheader("Content-Length", str(len(tile)))
            one.endheaders(tile[:100])
        until(
            lambda: server.counted("eurosat_requests_open") == len(begun) + 1,
            10,
            "requests that have begun, and the one that asks for their number",
        )
        server.process.terminate()

        def deaf() -> bool:
            try:
                requests.get(f"{server.url}/ready", timeout=5)
            except requests.RequestException:
                return True
            return False

        until(deaf, 10, "an end of listening")
        assert server.process.poll() is None
        for one in begun:
            one.send(tile[100:])
        answers = [one.getresponse() for one in begun]
        assert [answer.status for answer in answers] == [200] * len(begun)
        assert all(b'"label": "SeaLake"' in answer.read() for answer in answers)
        assert server.process.wait(timeout=10) == 0
    assert "killed" not in server.log.read_text()


def test_it_fails_in_one_line(
    pair: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = {
        ("--host", "0.0.0.0"): "0.0.0.0 can be reached by others: give --keys FILE",
        ("--port", str(pair.port)): "cannot be listened on",
        ("--processes", "0"): "--processes must be above 0",
        ("--max-queue", "0"): "queue must be above 0",
        ("--max-deadline-s", "nan"): "deadline_s must be above 0",
    }
    for flags, said in wrong.items():
        assert fails(server.main, *flags) == 2
        assert said in last_error(capfd)


def test_a_worker_that_says_what_is_wrong_ends_the_server(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "serving.server", "--port", str(free_port())]
    command += ["--processes", "1", "--keys", str(tmp_path / "none.txt")]
    root = str(ROOT)
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2
    assert "none.txt cannot be read: make it with `python -m serving.keys NAME`" in ended.stderr


@pytest.mark.parametrize(
    ("host", "alone"),
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
def test_what_others_cannot_reach_is_known(host: str, alone: bool) -> None:
    assert server.loopback(host) == alone


def test_limits_are_divided_among_processes() -> None:
    each = Limits(queue=128, requests=3).shared(4)
    assert (each.queue, each.requests, each.tiles) == (32, 1, Limits().tiles)


def test_a_bucket_fills_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("serving.limits.time", SimpleNamespace(monotonic=lambda: now))
    bucket = Bucket(2)
    assert [bucket.take() for _ in range(3)] == [True, True, False]
    now += 0.5
    assert [bucket.take() for _ in range(2)] == [True, False]
    now += 1000
    assert [bucket.take() for _ in range(3)] == [True, True, False]


def test_a_key_is_printed_once_and_its_hash_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.txt"
    assert keys.main(["team", "--file", str(file), "--per-second", "3"]) == 0
    key = capsys.readouterr().out.strip()
    assert len(key) >= 43, "of 32 random bytes"
    assert key not in file.read_text()
    assert file.read_text() == f"team {hashlib.sha256(key.encode()).hexdigest()} 3\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert keys.Keys.read(file).admit({"x-api-key": key}) == "team"


def test_a_file_that_others_may_read_is_closed_to_them(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    file.write_text("# who may ask\n\n")
    file.chmod(0o644)
    first, second = (keys.create(file, name, 1) for name in ("one", "two"))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    read = keys.Keys.read(file)
    assert [read.admit({"authorization": f"bearer {key}"}) for key in (first, second)] == [
        "one",
        "two",
    ]
    with pytest.raises(Refused, match="send an API key"):
        read.admit({"authorization": "bearer "})


@pytest.mark.parametrize(
    ("name", "per_s", "said"),
    [
        ("one", 1.0, "has a key one already"),
        ("a b", 1.0, "a key's name is 1 to 64 letters"),
        ("two", 0.0, "--per-second must be above 0"),
        ("two", float("nan"), "--per-second must be above 0"),
    ],
)
def test_keys_that_cannot_be_made(tmp_path: Path, name: str, per_s: float, said: str) -> None:
    file = tmp_path / "keys.txt"
    keys.create(file, "one", 1)
    before = file.read_text()
    with pytest.raises(ConfigError, match=said):
        keys.create(file, name, per_s)
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
def test_a_line_that_is_no_key_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "keys.txt"
    file.write_text(f"# keys\n{line}\n")
    with pytest.raises(ConfigError, match=r"keys.txt:2 is no line of name, sha256 and requests"):
        keys.Keys.read(file)
