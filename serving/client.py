"""Send image files to a server that speaks MLflow's protocol, and return its predictions."""

import base64
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from eurosat.errors import DataError, EuroSATError
from eurosat.runtime import cli, exit_codes, logs

TILES_PER_REQUEST = 64
TIMEOUT_S = 60.0
POLL_INTERVAL_S = 0.1
KEY_VARIABLE = "EUROSAT_SERVING_KEY"
"""Environment variable with the API key, for a server that requires one."""
SUMMARY_KEYS = ("label", "confidence", "model_version")
"""Keys of a prediction that are printed without --json."""


class ServerProcess(Protocol):
    """A process that may have ended, such as a `subprocess.Popen`."""

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""


class ServerError(EuroSATError):
    """The server cannot be reached, or answers with an error."""


class TileRefused(ServerError):
    """The server refuses one tile of a request."""

    def __init__(self, message: str, tile: str) -> None:
        super().__init__(message)
        self.tile = tile
        """Its name."""


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


def score_each(
    url: str, tiles: Mapping[str, bytes]
) -> tuple[list[dict[str, Any]], list[TileRefused]]:
    """Return the predictions as `score` does, and an error for each tile that is refused.

    Raises:
        ServerError: no server answers, or it refuses more than single tiles.
    """
    predictions: list[dict[str, Any]] = []
    refusals: list[TileRefused] = []
    names = list(tiles)
    for start in range(0, len(names), TILES_PER_REQUEST):
        chunk = {name: tiles[name] for name in names[start : start + TILES_PER_REQUEST]}
        while chunk:
            try:
                predictions += score(url, chunk)
                break
            except TileRefused as error:
                refusals.append(error)
                del chunk[error.tile]
    return predictions, refusals


def wait_ready(url: str, process: ServerProcess | None, timeout_s: float) -> None:
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
            raise ServerError(f"the server for {url} ended with code {process.poll()}")
        if time.monotonic() > deadline:
            raise ServerError(f"{url} was not ready within {timeout_s:g} s: see the server's log")
        time.sleep(POLL_INTERVAL_S)


def error_reason(body: str, names: Sequence[str] = ()) -> tuple[str, str | None]:
    """Return the reason of an error response in one line, and the tile that it is about if any.

    In the reason the tile's name replaces "row N". MLflow's own server puts a copy of the request
    before the reason, which is cut off.
    """
    try:
        payload = json.loads(body)
        message = str(payload["reason"] if "reason" in payload else payload["message"])
    except (ValueError, KeyError, TypeError):
        message = body
    reason = " ".join(message.rpartition("\nError: ")[2].split())[:300]
    row = re.match(r"row (\d+): ", reason)
    if row and int(row[1]) < len(names):
        tile = names[int(row[1])]
        return f"{tile}: {reason[row.end() :]}", tile
    return reason, None


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
        reason, tile = error_reason(response.text, names)
        message = f"{url} answered {response.status_code}: {reason}"
        raise TileRefused(message, tile) if tile else ServerError(message)
    try:
        return list(response.json()["predictions"])
    except (ValueError, KeyError, TypeError) as error:
        raise ServerError(f"{url} is not an MLflow scoring server: choose another --url") from error


def _read_files(files: Sequence[str]) -> tuple[dict[str, bytes], list[str]]:
    """Return the bytes of the files that can be read, by file, and what is wrong with the others.

    Raises:
        DataError: none of them can be read.
    """
    tiles, faults = {}, []
    for file in files:
        try:
            tiles[file] = Path(file).read_bytes()
        except OSError as error:
            faults.append(f"{file} cannot be read: {error.strerror}")
    if not tiles:
        raise DataError("; ".join(faults))
    return tiles, faults


def main(argv: Sequence[str]) -> int:
    parser = cli.parser(
        "serving.client",
        "Send image files to a server, and print one line of JSON per file. Exit with 1 if a file "
        "cannot be read or is refused; the others are predicted.",
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
    tiles, faults = _read_files(args.files)
    if args.wait:
        wait_ready(url, None, args.wait)
    predictions, refusals = score_each(url, tiles)
    by_file = {prediction["tile"]: prediction for prediction in predictions}
    for file in args.files:
        if prediction := by_file.get(file):
            summary = {key: prediction[key] for key in ("tile", *SUMMARY_KEYS)}
            print(json.dumps(prediction if args.json else summary))
    faults += [str(refusal) for refusal in refusals]
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return exit_codes.NEGATIVE if faults else exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
