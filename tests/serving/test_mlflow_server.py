"""A real ``mlflow models serve``, started by our command and called over REST."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import requests

from registry import register, versions
from serving import client, mlflow_server
from tests.support.commands import fails, last_error
from tests.support.images import (
    COLOURS,
    MALFORMED,
    REJECTED,
    encoded,
    files,
    pixels,
    raw,
)
from tests.support.mlflow_server import START_TIMEOUT_S, free_port
from tests.support.processes import start
from tests.support.registry import REGISTRY, TAGS, make_network, make_run

pytestmark = REGISTRY


@pytest.fixture(scope="module")
def version(store: Path) -> str:
    register.register(
        make_run(store), "eurosat", "challenger"
    )  # so that the champion is not version 1
    number = register.register(make_run(store), "eurosat", "challenger")
    versions.client().set_registered_model_alias("eurosat", "champion", number)
    return number


@pytest.fixture(scope="module")
def url(store: Path, version: str) -> Iterator[str]:
    port = free_port()
    log = store / "server.log"
    process = start("serving.mlflow_server", "--port", str(port), folder=store, log=log)
    try:
        client.wait_ready(f"http://127.0.0.1:{port}", process, START_TIMEOUT_S)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def post(url: str, payload: object) -> requests.Response:
    body = json.dumps(payload)  # requests would refuse NaN
    headers = {"Content-Type": "application/json"}
    return requests.post(f"{url}/invocations", data=body, headers=headers, timeout=60)


def predictions(url: str, payload: object) -> list[dict[str, Any]]:
    answer = post(url, payload)
    assert answer.status_code == 200, answer.text[-500:]
    return list(answer.json()["predictions"])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_files_are_scored(url: str, kind: str) -> None:
    assert [
        prediction["label"] for prediction in predictions(url, files(encoded("River", kind)))
    ] == ["River"]
    many = predictions(url, files(*[encoded(label, kind) for label in COLOURS]))
    assert [prediction["label"] for prediction in many] == list(COLOURS)


def test_predictions_equal_onnx_runtime_and_name_their_provenance(
    url: str, version: str, tmp_path: Path
) -> None:
    tiles = np.stack([pixels(label) for label in COLOURS])
    session = onnxruntime.InferenceSession(make_network(tmp_path / "model.onnx"))
    (expected,) = session.run(["probabilities"], {"tiles_NHWC": tiles})
    run_id = versions.run_of(versions.get("eurosat", version))
    for payload in (raw(*tiles), files(*[encoded(label) for label in COLOURS])):
        answers = predictions(url, payload)
        answered = [list(answer["probabilities"].values()) for answer in answers]
        np.testing.assert_allclose(answered, expected, atol=1e-6)
        for answer in answers:
            assert answer["model_version"] == version
            assert answer["data_fingerprint"] == TAGS["data.fingerprint"]
            assert answer["run_id"] == run_id
            assert answer["confidence"] == answer["probabilities"][answer["label"]]


def test_a_single_raw_tile_is_a_batch_of_1(url: str) -> None:
    assert [prediction["label"] for prediction in predictions(url, raw(pixels("SeaLake")))] == [
        "SeaLake"
    ]
    assert predictions(url, {"instances": raw(pixels("SeaLake"))["inputs"]})


@pytest.mark.parametrize("case", list(REJECTED))
def test_invalid_tiles_get_a_400_with_the_reason(url: str, case: str) -> None:
    payload, reason = REJECTED[case]
    answer = post(url, payload)
    assert answer.status_code == 400
    assert answer.json()["error_code"] == "INVALID_PARAMETER_VALUE"
    reason_line = answer.json()["message"].rpartition("\nError: ")[2]
    assert reason in reason_line
    assert "\n" not in reason_line
    assert len(reason_line) < 300
    assert "SECRET" not in reason_line


@pytest.mark.parametrize("case", list(MALFORMED))
def test_payloads_that_mlflow_rejects_itself_get_a_400_too(url: str, case: str) -> None:
    assert post(url, MALFORMED[case]).status_code == 400


def test_the_client_prints_a_line_per_tile(
    url: str, version: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiles = [tmp_path / f"{label}.jpg" for label in COLOURS]
    for tile in tiles:
        tile.write_bytes(encoded(tile.stem, "JPEG"))
    arguments = ["--url", f"{url}/", "--wait", "5", *map(str, [*tiles, tiles[0]])]
    assert client.main(arguments) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["tile"] for line in lines] == arguments[-4:]
    assert [line["label"] for line in lines] == [*COLOURS, tiles[0].stem]
    assert set(lines[0]) == {"tile", "label", "confidence", "model_version"}
    assert {line["model_version"] for line in lines} == {version}
    assert client.main([*arguments, "--json"]) == 0
    assert "probabilities" in json.loads(capsys.readouterr().out.splitlines()[0])


def test_the_client_sends_many_tiles_in_several_requests(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "TILES_PER_REQUEST", 2)
    answers = client.score(url, {label: encoded(label) for label in COLOURS})
    assert [(answer["tile"], answer["label"]) for answer in answers] == [
        (name, name) for name in COLOURS
    ]


def test_the_client_passes_on_the_reason_without_the_echo(
    url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tile = tmp_path / "tile.jpg"
    tile.write_bytes(b"SECRETSECRET")
    assert fails(client.main, "--url", url, str(tile)) == 1
    error = last_error(capfd)
    assert f"answered 400: {tile}: 12 bytes that are not a JPEG, PNG or TIFF file" in error
    assert "SECRET" not in error


def test_a_client_without_a_server_or_a_file_fails_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    tile = tmp_path / "tile.png"
    tile.write_bytes(encoded())
    assert fails(client.main, "--url", nobody, str(tile)) == 2
    assert f"no answer from {nobody}" in last_error(capfd)
    assert fails(client.main, "--url", nobody, "--wait", "0.2", str(tile)) == 2
    assert "was not ready within 0.2 s" in last_error(capfd)
    assert fails(client.main, "--url", nobody, str(tmp_path / "none.png")) == 2
    assert "none.png cannot be read" in last_error(capfd)


def test_waiting_for_a_server_ends_when_its_process_ends() -> None:
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(client.ServerError, match="ended with code 3"):
        client.wait_ready(f"http://127.0.0.1:{free_port()}", process, START_TIMEOUT_S)


def test_a_server_without_mlflows_protocol_is_named(url: str) -> None:
    with pytest.raises(client.ServerError, match="answered 404"):
        client.score(f"{url}/elsewhere", {"tile": encoded()})


def test_serving_fails_in_one_line(
    version: str, url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert (
        fails(mlflow_server.main, "--model", "models:/eurosat@nobody", "--port", str(free_port()))
        == 2
    )
    assert "models:/eurosat@nobody" in last_error(capfd)
    assert fails(mlflow_server.main, "--port", url.rpartition(":")[2]) == 2
    assert "cannot listen on" in last_error(capfd)
    assert fails(mlflow_server.main, "--workers", "0") == 2
    assert "--workers must be 1 or more" in last_error(capfd)


def test_the_server_runs_in_this_environment_without_telemetry(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    executed: dict[str, Any] = {}
    monkeypatch.setattr(
        os, "execve", lambda file, argv, env: executed.update(file=file, argv=argv, env=env)
    )
    port = str(free_port())
    mlflow_server.main(["--port", port, "--workers", "2"])
    assert executed["file"] == sys.executable
    assert executed["argv"][1:5] == ["-m", "mlflow", "models", "serve"]
    pairs = set(zip(executed["argv"], executed["argv"][1:], strict=False))
    assert pairs >= {
        ("--model-uri", f"models:/eurosat/{version}"),
        ("--env-manager", "local"),
        ("--port", port),
        ("--workers", "2"),
    }
    assert executed["env"]["MLFLOW_DISABLE_TELEMETRY"] == executed["env"]["DO_NOT_TRACK"] == "true"
    assert executed["env"]["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_a_model_loaded_by_its_run_has_no_version(store: Path) -> None:
    import mlflow.pyfunc

    run_id = make_run(store)
    register.register(run_id, "another", "challenger")
    loaded = mlflow.pyfunc.load_model(f"runs:/{run_id}/model")
    (answer,) = loaded.predict(loaded.input_example)
    assert answer["model_version"] is None
    assert answer["run_id"] == run_id
