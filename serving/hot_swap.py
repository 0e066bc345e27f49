"""Load versions of the served model, test them, and swap them while requests are answered."""

import asyncio
import errno
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from eurosat import tracking
from eurosat.errors import ModelError, TrackingError
from eurosat.runtime import hardware
from serving import earlier_versions, judged_files
from serving.limits import Limits
from serving.metrics import Metrics, VersionLabels

log = logging.getLogger(__name__)

WARM_UP_BATCHES = (1, 2, 8, 32, 64)
"""Numbers of tiles that a version predicts before it gets any traffic."""
SELF_TEST_TOLERANCE = 0.1
"""Largest difference of a probability of the example: INT8 results differ between CPUs."""
PASSING_ERRNOS = (errno.ENOSPC, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EDQUOT, errno.EIO)
ALLOCATION_FAILED = re.compile("bad_alloc|[Ff]ailed to allocate memory")
"""Message of ONNX Runtime."""
COPY_PREFIX = "eurosat-model-"
"""Begins the name of the folder with a process's copy of a version; its process id follows."""
MAX_RETRY_S = 30.0
"""Longest time between two attempts to load a version; it doubles from the poll interval."""
GREY = 128
EWMA_ALPHA = 0.1
"""Weight of the newest batch in the moving average of batch times."""
OVERLOAD_SHARE = 0.75
"""Share of the time that a full queue takes at the best pace. An overloaded server queues only the
tiles that it can predict in this time.
"""
OVERLOAD_S = 10.0
"""How long a server counts as overloaded after its queue was full; then the whole queue is used."""
BEST_TIME_DECAY = 1 + 1e-5
"""Growth of the best batch time with every batch, so that a lasting slowdown is accepted."""


class SelfTestFailed(ModelError):
    """A version cannot be loaded, or predicts its example differently than when registered."""


@dataclass(kw_only=True, eq=False)
class LoadedVersion:
    """A loaded version of the model, its queue of tiles, and the requests that use it.

    As a context manager it counts a request, so that `drain` waits for it.
    """

    uri: str
    version: str | None
    model: Any
    """MLflow's PyFuncModel."""
    classifier: Any
    """``TileClassifier`` of the ``serving/pyfunc.py`` that the version carries."""
    app: Any
    """MLflow's scoring app around the model."""
    files: ExitStack
    """Owns this process's copy of the version's files and code, until the version is drained."""
    waiting: deque[Any] = field(default_factory=deque)
    """Tiles that wait for their batch."""
    in_flight: int = 0
    """Requests that are not answered yet."""
    _batch_s: float = 0.0
    """Moving average of the time from one full batch to the next while tiles wait, which includes
    reading requests and writing answers.
    """
    _best_batch_s: float = math.inf
    _last_batch_at: float = 0.0
    """When the last full batch ended, on the monotonic clock; 0 after an idle time."""
    _overloaded_until: float = 0.0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __enter__(self) -> "LoadedVersion":
        self.in_flight += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self._idle.set()

    @cached_property
    def batch_size(self) -> int:
        """Tiles in one run of the network with default options."""
        return int(self.classifier.max_tiles_per_batch(self.classifier.parse_options({})))

    @cached_property
    def labels(self) -> VersionLabels:
        run_id = self.classifier.provenance["run_id"]
        return VersionLabels(str(self.version), run_id, self.classifier.precision)

    def is_full(self, limits: Limits, unanswered: int) -> bool:
        """Return whether a new request must be rejected; ``unanswered`` requests have arrived.

        For `OVERLOAD_S` after a rejection the queue is shorter (see `OVERLOAD_SHARE`): a longer one
        would not predict more tiles, only each of them later.
        """
        room, now = limits.queue + limits.uneven, time.monotonic()
        overloaded = now < self._overloaded_until
        if overloaded and self._batch_s:
            pace = min(1.0, OVERLOAD_SHARE * self._best_batch_s / self._batch_s)
            room = max(1, int(limits.queue * pace))
        full = len(self.waiting) >= room or unanswered >= room + self.batch_size
        if full and not overloaded:
            self._overloaded_until = now + OVERLOAD_S
        return full

    def submit(
        self, rows: Sequence[object], options: Any, deadline: float | None
    ) -> "list[asyncio.Future[dict[str, Any]]]":
        """Queue rows and return their predictions to come.

        Tiles that arrive while a batch is computed make the next batch. The network runs in the
        thread of the event loop: there is one process per core, and handing tiles to another
        thread would cost more than the loop could do meanwhile.
        """
        loop = asyncio.get_running_loop()
        new_tile, new_future = self.classifier.pending_tile, loop.create_future
        tiles = [new_tile(row, options, deadline, new_future()) for row in rows]
        if not self.waiting:
            loop.call_later(0, self._run_next_batch)  # after all sockets have been read
            self._last_batch_at = 0.0
        self.waiting.extend(tiles)
        return [tile.future for tile in tiles]

    def _run_next_batch(self) -> None:
        """Compute one batch, then let the event loop read the sockets again."""
        options = self.waiting[0].options
        max_tiles = self.classifier.max_tiles_per_batch(options)
        batch: list[Any] = []
        while self.waiting and len(batch) < max_tiles:
            if self.waiting[0].options.tta != options.tta:
                break
            batch.append(self.waiting.popleft())
        try:
            self.classifier.run_batch(batch)
        except Exception as error:
            log.exception("a batch of %d tiles failed", len(batch))
            for tile in batch:
                if not tile.future.done():
                    tile.future.set_exception(error)
        if self.waiting:
            asyncio.get_running_loop().call_later(0, self._run_next_batch)
        if len(batch) == max_tiles:
            self._record_batch_time(time.monotonic())

    def _record_batch_time(self, now: float) -> None:
        if self._last_batch_at:
            batch_s = now - self._last_batch_at
            self._batch_s += EWMA_ALPHA * (batch_s - self._batch_s) if self._batch_s else batch_s
            self._best_batch_s = min(self._best_batch_s * BEST_TIME_DECAY, self._batch_s)
        self._last_batch_at = now

    async def drain(self) -> None:
        """Wait for the requests in flight, then release threads, files and memory."""
        while self.in_flight:
            self._idle.clear()
            await self._idle.wait()
        await asyncio.to_thread(self.classifier.close)
        self.files.close()
        await asyncio.to_thread(hardware.malloc_trim)


def load(uri: str, model_config: Mapping[str, Any]) -> LoadedVersion:
    """Load a version, warm it up, and test it on its own example.

    Raises:
        TrackingError: its files cannot be downloaded.
        SelfTestFailed: it must not get traffic.
    """
    import mlflow.pyfunc
    from mlflow.artifacts import download_artifacts
    from mlflow.models import Model
    from mlflow.pyfunc import scoring_server

    remove_copies_of_the_dead()
    with ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix=f"{COPY_PREFIX}{os.getpid()}-")
        )
        with tracking.translate_errors(uri):
            files = download_artifacts(uri, dst_path=folder)
        try:
            judged_files.check(uri, Path(files))
            saved_config = Model.load(files).flavors["python_function"].get("config") or {}
            config = earlier_versions.model_config(model_config, saved_config)
            model = mlflow.pyfunc.load_model(files, model_config=config)
            classifier = earlier_versions.adapt(model.unwrap_python_model())
            stack.callback(sys.modules.pop, type(classifier).__module__, None)
            _self_test(model, classifier)
        except (SelfTestFailed, TrackingError):
            raise
        except Exception as error:  # the version's own code ran, and may raise anything
            if _may_pass(error):
                raise
            message = f"it cannot be loaded ({type(error).__name__}: {error})"
            raise SelfTestFailed(message) from error
        return LoadedVersion(
            uri=uri,
            version=classifier.provenance["model_version"],
            model=model,
            classifier=classifier,
            app=scoring_server.init(model),
            files=stack.pop_all(),
        )


def remove_copies_of_the_dead() -> None:
    """Remove the copies of versions that killed processes have left."""
    for copy in Path(tempfile.gettempdir()).glob(f"{COPY_PREFIX}*-*"):
        pid = copy.name.removeprefix(COPY_PREFIX).partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            shutil.rmtree(copy, ignore_errors=True)


def _may_pass(error: Exception) -> bool:
    """Return whether the fault is this machine's, such as no memory or no space on the disk."""
    if isinstance(error, OSError):
        return error.errno in PASSING_ERRNOS
    return isinstance(error, MemoryError) or ALLOCATION_FAILED.search(str(error)) is not None


def _self_test(model: Any, classifier: Any) -> None:
    """Warm the version up, and compare its example's probabilities to the registered ones.

    Raises:
        SelfTestFailed: a probability differs by more than `SELF_TEST_TOLERANCE`.
    """
    tile_HWC = np.full(classifier.shape_HWC, GREY, np.uint8)
    for count in WARM_UP_BATCHES:
        predictions = _predict(classifier, [tile_HWC] * count)[:1]
    if (example := model.input_example) is not None:
        predictions += model.predict(example)
    expected = classifier.example_probabilities or ()
    for prediction in predictions:
        actual = np.array(list(prediction["probabilities"].values()))
        same_length = len(actual) == len(expected)
        difference = float(np.abs(actual - expected).max()) if same_length else np.inf
        if not difference <= SELF_TEST_TOLERANCE:
            raise SelfTestFailed(
                f"a probability of its example differs by {difference:.3f} from the registered "
                f"one, over the {SELF_TEST_TOLERANCE:g} allowed: register its run again"
            )


def _predict(classifier: Any, rows: list[Any]) -> list[Any]:
    options = classifier.parse_options({})
    max_tiles = classifier.max_tiles_per_batch(options)
    tiles = [classifier.pending_tile(row, options, None, Future()) for row in rows]
    for start in range(0, len(tiles), max_tiles):
        classifier.run_batch(tiles[start : start + max_tiles])
    return [tile.future.result() for tile in tiles]


class AliasWatcher:
    """Keeps `current` the version that a reference names, and polls the registry for an alias."""

    def __init__(
        self, reference: str, model_config: Mapping[str, Any], poll_s: float, metrics: Metrics
    ) -> None:
        self.reference, self.poll_s = reference, poll_s
        self._model_config, self._metrics = dict(model_config), metrics
        self.current: LoadedVersion | None = None
        self.swaps = 0
        self.refused: dict[str, str] = {}
        """URI of a version that failed its self-test -> the reason; it is not tried again."""
        self._draining: set[asyncio.Task[None]] = set()
        self._last_error = ""
        self._failures, self._retry_at = 0, 0.0

    async def watch(self) -> None:
        """Poll the alias until cancelled; an error is logged once, and tried again."""
        while self.current is None or judged_files.ALIAS.fullmatch(self.reference):
            await asyncio.sleep(self.poll_s)
            await self.check_alias()

    async def check_alias(self) -> None:
        """Load and swap in the version of the alias, unless it is current or was refused."""
        if time.monotonic() < self._retry_at:
            return
        try:
            uri = await asyncio.to_thread(judged_files.resolve_alias, self.reference)
            if (self.current and self.current.uri == uri) or uri in self.refused:
                return
            log.info("loading %s", uri)
            try:
                new = await asyncio.to_thread(load, uri, self._model_config)
            except SelfTestFailed as error:
                self.refused[uri] = " ".join(str(error).split())
                self._metrics.record_refused_version()
                log.error("%s gets no traffic: %s", uri, self.refused[uri])
                return
            except Exception:
                pause_s = min(self.poll_s * 2.0 ** min(self._failures, 30), MAX_RETRY_S)
                self._failures, self._retry_at = self._failures + 1, time.monotonic() + pause_s
                raise
        except Exception as error:  # noqa: BLE001 - the current version must go on
            message = " ".join(str(error).split())[:300]
            if message != self._last_error:
                log.warning("%s cannot be loaded, trying again: %s", self.reference, message)
            self._last_error = message
            return
        self._last_error, self._failures = "", 0
        self._swap(new)

    def _swap(self, new: LoadedVersion) -> None:
        old, self.current = self.current, new
        self._metrics.record_swap(old.labels if old else None, new.labels)
        precision = new.classifier.precision
        if old is None:
            log.info("serving %s (%s)", new.uri, precision)
            return
        self.swaps += 1
        log.info("serving %s (%s); %s finishes its requests", new.uri, precision, old.uri)
        task = asyncio.create_task(old.drain())
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)

    async def close(self) -> None:
        """Let every version finish its requests."""
        current, self.current = self.current, None
        await asyncio.gather(*self._draining, *([current.drain()] if current else []))
