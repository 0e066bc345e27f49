"""Users in front of a server of ours; locust is no dependency of this project.

    uvx locust -f tests/load/locustfile.py --host http://127.0.0.1:5001 --tile tile.jpg \
        --headless --users 32 --spawn-rate 8 --run-time 1m

Without --headless it shows a page. One kind of user alone: name its class after the flags.
A server that asks for a key gets that of the variable EUROSAT_API_KEY. A 429 counts as a failure:
that is what a server says that has more users than it can answer.
"""

import base64
import os
from argparse import ArgumentParser
from pathlib import Path

from locust import FastHttpUser, constant_throughput, events, task


@events.init_command_line_parser.add_listener
def _add_tile(parser: ArgumentParser) -> None:
    parser.add_argument("--tile", default="tile.jpg", help="a JPEG that every user sends")


class Asker(FastHttpUser):
    """Knows the tile and the key."""

    abstract = True

    def on_start(self) -> None:
        self.tile = Path(self.environment.parsed_options.tile).read_bytes()
        key = os.environ.get("EUROSAT_API_KEY")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}


class Mapper(Asker):
    """A program that sends one tile after another, as fast as it is answered."""

    weight = 4

    @task
    def predict(self) -> None:
        headers = self.headers | {"Content-Type": "image/jpeg"}
        self.client.post("/predict", data=self.tile, headers=headers)


class Analyst(Asker):
    """Somebody at a screen: a tile a second, mostly with the places that spoke for its label."""

    weight = 2
    wait_time = constant_throughput(1)

    @task(3)
    def look(self) -> None:
        headers = self.headers | {"Content-Type": "image/jpeg"}
        self.client.post("/predict?top_k=3&explain=true", data=self.tile, headers=headers)

    @task
    def ask_where_it_is_from(self) -> None:
        self.client.get("/model", headers=self.headers)


class Archive(Asker):
    """A job that sends 32 tiles at a time, by our route and by MLflow's."""

    weight = 1

    def on_start(self) -> None:
        super().on_start()
        self.texts = [base64.b64encode(self.tile).decode()] * 32

    @task(2)
    def batch(self) -> None:
        self.client.post("/predict/batch", json={"images": self.texts}, headers=self.headers)

    @task
    def invocations(self) -> None:
        rows = {"columns": ["image"], "data": [[text] for text in self.texts]}
        self.client.post("/invocations", json={"dataframe_split": rows}, headers=self.headers)
