"""Training loops that take turns: each runs when told, for as long as told, and says how fast.

Arms of a benchmark are processes that stand ready, so that they are measured interleaved on one
machine without paying their imports each time. Needs nothing of this project: it runs in the
environments of others too.
"""

import json
import os
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback

START_BATCHES = 8
"""Before the first turn: kernels are chosen and worker processes are up."""
WARMUP_BATCHES = 6
"""At the start of each turn: what loaders fetched ahead while they waited is not counted."""


class Interleaver:
    """``step(images)`` after each batch; blocks while it is not this arm's turn."""

    def __init__(self) -> None:
        self._unmeasured_batches = START_BATCHES
        self._until = 0.0
        self._running = False

    def step(self, images: int) -> None:
        if self._unmeasured_batches > 0:
            self._unmeasured_batches -= 1
            if self._unmeasured_batches == 0 and self._running:
                self._started, self._images = synchronised_time(), 0
            elif self._unmeasured_batches == 0:
                self._send({"ready": True})
                self._wait_for_turn()
            return
        self._images += images
        if time.perf_counter() - self._started >= self._seconds:
            told = {"images": self._images, "seconds": synchronised_time() - self._started}
            self._send(told | {"private_gb": private_gb()})
            self._wait_for_turn()

    def _wait_for_turn(self) -> None:
        words = sys.stdin.readline().split()
        if not words or words[0] == "stop":
            os._exit(0)  # mid-epoch, with loaders running: nothing here is worth an orderly end
        self._seconds, self._running, self._unmeasured_batches = (
            float(words[1]),
            True,
            WARMUP_BATCHES,
        )

    def _send(self, what: dict[str, Any]) -> None:
        print(f"\n{json.dumps(what)}", file=sys.__stdout__, flush=True)  # after any progress bar


class InterleaverCallback(Callback):
    """Turns of a Lightning training."""

    def __init__(self) -> None:
        self._turns = Interleaver()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        labels = batch["label"] if isinstance(batch, dict) else batch[1]
        self._turns.step(len(labels))


def synchronised_time() -> float:
    """The time at which all that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def private_gb() -> float:
    """RssAnon of this process: memory it shares with no file."""
    with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123 - kept light
        lines = [line.split() for line in status if line.startswith("RssAnon")]
    return int(lines[0][1]) / 2**20 if lines else float("nan")
