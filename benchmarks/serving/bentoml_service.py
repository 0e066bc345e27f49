"""BentoML with adaptive batching: `bentoml serve benchmarks.serving.bentoml_service:Tiles`."""

import base64
import os

import bentoml
import numpy as np

from benchmarks.serving import networks
from benchmarks.serving.networks import Answer

MAX_BATCH = 32
"""More is no faster. The longest latency is left at BentoML's own: with a shorter one it refuses
requests as soon as it reckons that they would take longer."""


@bentoml.service(
    workers=int(os.environ[networks.WORKERS]),
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
)
class Tiles:
    def __init__(self) -> None:
        self.network = networks.from_environment()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH)
    def predict(self, images: list[str]) -> list[Answer]:
        files = map(base64.b64decode, images)
        return self.network(np.stack([networks.decode(file) for file in files]))
