"""BentoML with adaptive batching: `bentoml serve benchmarks.serving.bentoml_service:Tiles`."""

import base64
import os

import bentoml
import numpy as np

from benchmarks.serving import networks
from benchmarks.serving.networks import Prediction

MAX_BATCH = 32
"""A larger one is not faster. BentoML keeps its default for the longest latency: with a shorter one
it rejects requests that it estimates to take longer.
"""


@bentoml.service(
    workers=int(os.environ[networks.WORKERS]),
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
)
class Tiles:
    def __init__(self) -> None:
        self.network = networks.from_environment()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH)
    def predict(self, images: list[str]) -> list[Prediction]:
        files = map(base64.b64decode, images)
        return self.network(np.stack([networks.decode(file) for file in files]))
