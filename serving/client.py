"""Send image files to a server that speaks MLflow's protocol, and return its predictions."""

import base64
import json
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eurosat.errors import DataError, EuroSATError
from eurosat.runtime import cli, exit_codes, logs

TILES_PER_REQUEST = 64
TIMEOUT_S = 60.0
POLL_INTERVAL_S = 0.1
KEY_VARIABLE = "EUROSAT_SERVING_KEY"
"""Environment variable with the API key, for a server that requires one."""
SUMMARY_KEYS = ("label", "confidence", "model_version")
"""Keys of a prediction that are printed without --json."""


class ServerError(EuroSATError):
    """The server cannot be reached, or answers with an error."""


def score(url: str, tiles: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """Return the predictions of ``tiles`` (name -> bytes of the file), in their order.

    Each prediction gets the name of its tile under the key "tile".

    Raises:
        ServerError: no server answers, or it rejects a tile; the message names the tile.
    """
    predictions: list[dict[str, Any]] = []
    names = list(tiles)
    for start in range(0, len(names), TILES_PER_REQUEST):
        chunk = names[start : start + TILES_PER_REQUEST]
        rows = [[base64.b64encode(tiles[name]).decode()] for name in chunk]
        payload = {"dataframe_split": {"columns": ["image"], "data": rows}}
        results = _invoke(url, payload, chunk)
        pairs = zip(chunk, results, strict=True)
        predictions += [{"tile": name} | result for name, result in pairs]
    return predictions


def wait_ready(url: str, process: "subprocess.Popen[Any] | None", timeout_s: float) -> None:
    """Poll /ping until it answers 200.

    Raises:
        ServerError: not within ``timeout_s``, or ``process`` ended before.
    """
    import requests

    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if requests.get(f"{url}/ping", timeout=1).ok:
                return
        except requests.RequestException:
            pass
        if process is not None and process.poll() is not None:
            raise ServerError(f"the server for {url} ended with code {process.returncode}")
        if time.monotonic() > deadline:
            raise ServerError(f"{url} was not ready within {timeout_s:g} s: see the server's log")
        time.sleep(POLL_INTERVAL_S)


def error_reason(body: str, names: Sequence[str] = ()) -> str:
    """Return the reason of an error response in one line, with "row N" as the name of the tile.

    MLflow's own server puts a copy of the request before the reason, which is cut off.
    """
    try:
        payload = json.loads(body)
        message = str(payload["reason"] if "reason" in payload else payload["message"])
    except (ValueError, KeyError, TypeError):
        message = body
    reason = " ".join(message.rpartition("\nError: ")[2].split())[:300]
    row = re.match(r"row (\d+): ", reason)
    if row and int(row[1]) < len(names):
        return f"{names[int(row[1])]}: {reason[row.end() :]}"
    return reason


def _invoke(url: str, payload: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    import requests

    key = os.environ.get(KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        response = requests.post(
            f"{url}/invocations", json=payload, headers=headers, timeout=TIMEOUT_S
        )
    except requests.RequestException as error:
        raise ServerError(
            f"no answer from {url} ({type(error).__name__}): start `python -m serving.server`, or "
            "choose another --url"
        ) from error
    if not response.ok:
        reason = error_reason(response.text, names)
        raise ServerError(f"{url} answered {response.status_code}: {reason}")
    try:
        return list(response.json()["predictions"])
    except (ValueError, KeyError, TypeError) as error:
        raise ServerError(f"{url} is not an MLflow scoring server: choose another --url") from error


def _read_file(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error


def main(argv: Sequence[str]) -> int:
    parser = cli.parser(
        "serving.client", "Send image files to a server, and print one line of JSON per file."
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a JPEG, PNG or TIFF tile")
    parser.add_argument("--url", default="http://127.0.0.1:5001", help="address of the server")
    parser.add_argument("--json", action="store_true", help="print the complete predictions")
    parser.add_argument(
        "--wait", type=float, default=0.0, metavar="S", help="seconds to wait for the server"
    )
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    url = args.url.rstrip("/")
    tiles = {file: _read_file(file) for file in args.files}
    if args.wait:
        wait_ready(url, None, args.wait)
    by_file = {prediction["tile"]: prediction for prediction in score(url, tiles)}
    for file in args.files:
        prediction = by_file[file]
        summary = {key: prediction[key] for key in ("tile", *SUMMARY_KEYS)}
        print(json.dumps(prediction if args.json else summary))
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
