"""The demo's last step: serve a model with MLflow and classify tiles of its test fold over REST."""

import contextlib
import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from eurosat import tracking
from eurosat.config import DataConfig
from eurosat.errors import DataError, EuroSATError

log = logging.getLogger(__name__)

SERVER_START_TIMEOUT_S = 120
"""The server starts in about 8 s on two idle cores."""
SHUTDOWN_GRACE_S = 30


def serve_and_score(model: str, run_id: str, count: int) -> list[dict[str, Any]]:
    """Serve ``model`` and return the predictions for ``count`` test tiles of different classes.

    ``run_id`` is the model's training run: its test fold gives the tiles and their labels.
    """
    from pyarrow import parquet

    from eurosat.evaluation.recorded import recorded_data

    with tracking.artifact(run_id, "predictions.parquet") as file:
        test_fold = parquet.read_table(file).to_pandas()
    one_per_class = test_fold.groupby("label", sort=True).head(1)
    chosen = one_per_class.iloc[:: max(1, len(one_per_class) // count)].head(count)
    with tempfile.TemporaryDirectory() as folder:
        files = write_tiles(recorded_data(run_id), list(chosen["tile"]), Path(folder))
        with model_server(model) as (server, url):
            predictions = score_files(server, url, files)
    rows = []
    for file_name, tile, label in zip(files, chosen["tile"], chosen["label"], strict=True):
        prediction = {k: v for k, v in predictions[file_name].items() if k != "tile"}
        rows.append({"tile": tile, "expected": label, **prediction})
    return rows


def write_tiles(config: DataConfig, tiles: Sequence[str], folder: Path) -> list[str]:
    """Copy tiles from their data source into ``folder``; return the paths of the copies.

    Raises:
        DataError: the source no longer has one of the tiles.
    """
    from eurosat.data.sources import open_source

    source = open_source(config)
    files = []
    for tile in tiles:
        if tile not in source.paths:
            raise DataError(
                f"the champion was tested on {tile}, which is not in {source.name} any more: "
                "restore the tile, or train a new champion"
            )
        file = folder / tile.replace("/", "-")
        file.write_bytes(source.read(tile))
        files.append(str(file))
    return files


@contextlib.contextmanager
def model_server(model: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """Run `mlflow models serve` in its own process group for the block; yield process and URL."""
    with socket.create_server(("127.0.0.1", 0)) as free_socket:
        port = str(free_socket.getsockname()[1])
    where = ["--env-manager", "local", "--host", "127.0.0.1", "--port", port]
    command = ["mlflow", "models", "serve", "-m", model, *where]
    print(f"$ {shlex.join(command)}", flush=True)
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, text=True
        )
        try:
            yield process, f"http://127.0.0.1:{port}"
        except EuroSATError as error:
            output.seek(0)
            last_lines = " | ".join(output.read().splitlines()[-5:])
            raise EuroSATError(f"{error}; the server's last lines: {last_lines}") from error
        finally:
            for signal_number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, signal_number)
                    process.wait(timeout=SHUTDOWN_GRACE_S)


def score_files(
    server: "subprocess.Popen[str]", url: str, files: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return the predictions of `python -m serving.client` by file.

    Raises:
        EuroSATError: the server ended, was not ready in time, or refused a tile.
    """
    flags = ["-m", "serving.client", "--url", url, "--wait", str(SERVER_START_TIMEOUT_S)]
    print(f"$ {shlex.join(['python', *flags, 'FILES'])}", flush=True)
    client = subprocess.Popen(
        [sys.executable, *flags, *files], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with Console(stderr=True).status("waiting for the server"):
        while client.poll() is None:
            if server.poll() is not None:
                client.terminate()
                raise EuroSATError(f"the server ended with exit code {server.returncode}")
            time.sleep(0.2)
    stdout, stderr = client.communicate()
    if client.returncode:
        raise EuroSATError(f"the tiles were not classified: {stderr.strip()[-300:]}")
    log.info("the predictions came from process %d at %s", server.pid, url)
    predictions = map(json.loads, stdout.splitlines())
    return {prediction["tile"]: prediction for prediction in predictions}
