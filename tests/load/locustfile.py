"""Simulated users of the server, for locust, which is not a dependency of this project.

    uvx locust -f tests/load/locustfile.py --host http://127.0.0.1:5001 --tile tile.jpg \
        --headless --users 32 --spawn-rate 8 --run-time 1m

Without --headless it opens a web page. To run one kind of user, append the name of its class. The
API key is read from EUROSAT_SERVING_KEY. A 429 counts as a failure: the server is overloaded.
"""

import base64
import os
from argparse import ArgumentParser
from pathlib import Path

from locust import FastHttpUser, constant_throughput, events, task


@events.init_command_line_parser.add_listener
def _add_tile(parser: ArgumentParser) -> None:
    parser.add_argument("--tile", default="tile.jpg", help="JPEG tile that every user sends")


class TileUser(FastHttpUser):
    """Sends the tile, with the API key."""

    abstract = True

    def on_start(self) -> None:
        self.tile = Path(self.environment.parsed_options.tile).read_bytes()
        key = os.environ.get("EUROSAT_SERVING_KEY")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}


class Mapper(TileUser):
    """A program that sends one tile after another, without a pause."""

    weight = 4

    @task
    def predict(self) -> None:
        headers = self.headers | {"Content-Type": "image/jpeg"}
        self.client.post("/predict", data=self.tile, headers=headers)


class Analyst(TileUser):
    """A person at a screen: one request per second, mostly with an activation map."""

    weight = 2
    wait_time = constant_throughput(1)

    @task(3)
    def explain(self) -> None:
        headers = self.headers | {"Content-Type": "image/jpeg"}
        self.client.post("/predict?top_k=3&explain=true", data=self.tile, headers=headers)

    @task
    def read_provenance(self) -> None:
        self.client.get("/model", headers=self.headers)


class Archive(TileUser):
    """A job that sends 32 tiles per request, by our route and by MLflow's."""

    weight = 1

    def on_start(self) -> None:
        super().on_start()
        self.images = [base64.b64encode(self.tile).decode()] * 32

    @task(2)
    def batch(self) -> None:
        self.client.post("/predict/batch", json={"images": self.images}, headers=self.headers)

    @task
    def invocations(self) -> None:
        rows = {"columns": ["image"], "data": [[image] for image in self.images]}
        self.client.post("/invocations", json={"dataframe_split": rows}, headers=self.headers)
