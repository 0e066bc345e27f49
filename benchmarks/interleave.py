"""Let training loops of several processes take turns, on command, and report their speed.

The arms of a benchmark are processes that have started and warmed up, so that they are measured
interleaved on one machine without repeating their imports. This module imports nothing of the
project: it also runs in the environments of other libraries.

Commands on stdin: ``go SECONDS`` and ``stop``. Answers on stdout: one JSON object per line.
"""

import json
import os
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback

START_BATCHES = 8
"""Batches before the arm is ready: kernels are chosen and worker processes run."""
WARMUP_BATCHES = 6
"""Unmeasured batches at the start of each turn, which loaders prefetched while they waited."""


class Interleaver:
    """Blocks a training loop, which calls `step` after each batch, while it is not its turn."""

    def __init__(self) -> None:
        self._unmeasured_batches = START_BATCHES
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
            seconds = synchronised_time() - self._started
            memory_gb = private_gb()
            self._send({"images": self._images, "seconds": seconds, "private_gb": memory_gb})
            self._wait_for_turn()

    def _wait_for_turn(self) -> None:
        command, *arguments = sys.stdin.readline().split() or ["stop"]
        if command == "stop":
            os._exit(0)  # in mid-epoch with loaders running: an orderly end is not worth it
        self._seconds, self._running = float(arguments[0]), True
        self._unmeasured_batches = WARMUP_BATCHES

    def _send(self, message: dict[str, Any]) -> None:
        print(f"\n{json.dumps(message)}", file=sys.__stdout__, flush=True)  # after a progress bar


class InterleaverCallback(Callback):
    """Interleaves a Lightning training."""

    def __init__(self) -> None:
        self._interleaver = Interleaver()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        labels = batch["label"] if isinstance(batch, dict) else batch[1]
        self._interleaver.step(len(labels))


def synchronised_time() -> float:
    """Return the time after all queued work of the GPU is done, in seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def private_gb() -> float:
    """Return the RssAnon of this process, memory that is backed by no file, in GiB."""
    with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123 - saves an import
        lines = [line.split() for line in status if line.startswith("RssAnon")]
    return int(lines[0][1]) / 2**20 if lines else float("nan")
