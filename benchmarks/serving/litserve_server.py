"""LitServe with batching: `python -m benchmarks.serving.litserve_server PORT`."""

import base64
import os
import sys
from collections.abc import Sequence
from typing import Any

import litserve
import numpy as np

from benchmarks.serving import networks
from benchmarks.serving.networks import Prediction, Tiles

MAX_BATCH, BATCH_TIMEOUT_S = 32, 0.002
"""Larger values were not faster. A timeout of 0 keeps two cores busy without any request."""


class TileAPI(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.network = networks.from_environment()

    def decode_request(self, request: dict[str, Any]) -> Tiles:
        return networks.decode(base64.b64decode(request["image"]))

    def batch(self, inputs: Sequence[Tiles]) -> Tiles:
        return np.stack(inputs)

    def predict(self, x: Tiles) -> list[Prediction]:
        return self.network(x)

    def unbatch(self, output: list[Prediction]) -> list[Prediction]:
        return output

    def encode_response(self, output: Prediction) -> Prediction:
        return output


if __name__ == "__main__":
    workers = int(os.environ[networks.WORKERS])
    server = litserve.LitServer(
        TileAPI(max_batch_size=MAX_BATCH, batch_timeout=BATCH_TIMEOUT_S),
        accelerator="cpu",
        workers_per_device=workers,
        fast_queue=True,
    )
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        num_api_servers=workers,
        log_level="warning",
        generate_client_file=False,
    )
