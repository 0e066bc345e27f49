"""Have tiles scored over REST by a server that speaks MLflow's protocol."""

import base64
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eurosat.errors import DataError, EuroSATError
from eurosat.runtime import cli, exit_codes, logs

TILES_PER_REQUEST = 64
TIMEOUT_S = 60.0
POLL_S = 0.1
"""Between two pings of a server that is starting."""
KEY = "EUROSAT_API_KEY"
"""Variable that holds the key of a server that asks for one."""
SHOWN = ("label", "confidence", "model_version")


class ServerError(EuroSATError):
    """The scoring server cannot be reached, or refuses."""


def score(url: str, tiles: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """Answers in the order of ``tiles`` (name to the file's bytes), each with its name as "tile".

    Raises:
        ServerError: no server there, or it refused a tile, whose name replaces the row's number.
    """
    answers: list[dict[str, Any]] = []
    for some in _chunks(list(tiles.items()), TILES_PER_REQUEST):
        names = [name for name, _ in some]
        rows = [[base64.b64encode(data).decode()] for _, data in some]
        scored = _invoke(url, {"dataframe_split": {"columns": ["image"], "data": rows}}, names)
        answers += [{"tile": tile} | answer for tile, answer in zip(names, scored, strict=True)]
    return answers


def wait_ready(url: str, process: "subprocess.Popen[Any] | None", timeout_s: float) -> None:
    """Return when /ping answers 200.

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
        time.sleep(POLL_S)


def reason(body: str, names: Sequence[str] = ()) -> str:
    """Why a server refused, in one line: MLflow puts an echo of the request before it."""
    try:
        told = json.loads(body)
        message = str(told["reason"] if "reason" in told else told["message"])
    except (ValueError, KeyError, TypeError):
        message = body
    said = " ".join(message.rpartition("\nError: ")[2].split())[:300]
    row = re.match(r"row (\d+): ", said)
    if row and int(row[1]) < len(names):
        return f"{names[int(row[1])]}: {said[row.end() :]}"
    return said


def _invoke(url: str, payload: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    import requests

    headers = {"Authorization": f"Bearer {os.environ[KEY]}"} if KEY in os.environ else {}
    try:
        answer = requests.post(
            f"{url}/invocations", json=payload, headers=headers, timeout=TIMEOUT_S
        )
    except requests.RequestException as error:
        raise ServerError(
            f"no answer from {url} ({type(error).__name__}): start `python -m serving.server` or "
            "name another --url"
        ) from error
    if not answer.ok:
        raise ServerError(f"{url} answered {answer.status_code}: {reason(answer.text, names)}")
    try:
        return list(answer.json()["predictions"])
    except (ValueError, KeyError, TypeError) as error:
        raise ServerError(f"{url} does not answer as an MLflow scoring server does") from error


def _chunks(items: list[tuple[str, bytes]], size: int) -> Iterator[list[tuple[str, bytes]]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _read(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error


def main(argv: Sequence[str]) -> int:
    parser = cli.parser(
        "serving.client", "Have image files scored by a server, and print one line of JSON each."
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a JPEG, PNG or TIFF tile")
    parser.add_argument("--url", default="http://127.0.0.1:5001")
    parser.add_argument("--json", action="store_true", help="the whole answers")
    parser.add_argument("--wait", type=float, default=0.0, metavar="S", help="for it to be ready")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    url = args.url.rstrip("/")
    tiles = {file: _read(file) for file in args.files}
    if args.wait:
        wait_ready(url, None, args.wait)
    answers = {answer["tile"]: answer for answer in score(url, tiles)}
    for file in args.files:
        answer = answers[file]
        shown = answer if args.json else {key: answer[key] for key in ("tile", *SHOWN)}
        print(json.dumps(shown))
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
