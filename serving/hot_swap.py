"""The version that answers, and the next one: loaded beside it, checked, swapped in, drained."""

import asyncio
import logging
import math
import re
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from eurosat import tracking
from eurosat.errors import ModelError
from eurosat.runtime import hardware
from serving.metrics import Metrics, VersionLabels

log = logging.getLogger(__name__)

ALIAS = re.compile(r"models:/([^/@]+)@([^/@]+)")
WARM_TILES = (1, 2, 8, 32, 64)
"""Sizes of the batches that a version answers before any client's."""
CHECK_TOLERANCE = 0.1
"""Of a probability of the example: whole numbers are summed otherwise on another CPU."""
GREY = 128
OF_LATE = 0.1
"""Weight of the newest turn."""
SHORT, OVERRUN_S = 0.75, 10.0
"""Share of its queue's usual time that an overrun server has tiles wait, and for how long it is one
before it tries the whole queue again.
"""
FORGETS = 1 + 1e-5
"""A turn, of how fast it was: another one of its kind may be slower for good."""


class CheckFailed(ModelError):
    """A version answers its own example otherwise than when it was registered."""


@dataclass(kw_only=True, eq=False)
class Live:
    """A loaded version, and how many requests it is answering."""

    uri: str
    version: str | None
    model: Any
    """MLflow's PyFuncModel."""
    classifier: Any
    """``TileClassifier`` of the ``serving/pyfunc.py`` that the version carries."""
    app: Any
    """MLflow's own scoring app around it."""
    files: ExitStack
    """Holds this process's copy of the version's files and code, until it is retired."""
    waiting: deque[Any] = field(default_factory=deque)
    """Tiles whose turn has not come."""
    asked: int = 0
    """Requests that it has not answered yet."""
    _turn_s: float = 0.0
    _best_turn_s: float = math.inf
    _turned_at: float = 0.0
    """From one full batch to the next while tiles wait, with all that is read and told in between:
    of late, at its best, and when the last one ended.
    """
    _overrun_until: float = 0.0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __enter__(self) -> "Live":
        self.asked += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.asked -= 1
        if not self.asked:
            self._idle.set()

    @cached_property
    def at_once(self) -> int:
        """Tiles that one pass of the network takes."""
        return int(self.classifier.most(self.classifier.wish({})))

    @cached_property
    def labels(self) -> VersionLabels:
        run_id = self.classifier.provenance["run_id"]
        return VersionLabels(str(self.version), run_id, self.classifier.form)

    def is_full(self, most: int, arrived: int) -> bool:
        """Whether a request must be refused where ``most`` tiles may wait, and so many requests
        have arrived.

        For a while from such a refusal on it is full sooner: by what is answered in `SHORT` of the
        time that ``most`` take at its best pace. A longer queue would not answer more tiles, only
        each of them later.
        """
        room, now = most, time.monotonic()
        overrun = now < self._overrun_until
        if overrun and self._turn_s:
            room = max(1, int(most * min(1.0, SHORT * self._best_turn_s / self._turn_s)))
        full = len(self.waiting) >= room or arrived >= room + self.at_once
        if full and not overrun:
            self._overrun_until = now + OVERRUN_S
        return full

    def ask(
        self, rows: Sequence[object], wish: Any, deadline: float | None
    ) -> "list[asyncio.Future[dict[str, Any]]]":
        """Answers to come. Tiles that arrive while a batch is computed make the next one.

        The network runs on the event loop's own thread: handing tiles to another one costs more
        than this process could do meanwhile, as there is a process for each core.
        """
        loop = asyncio.get_running_loop()
        jobs = [self.classifier.job(row, wish, deadline, loop.create_future()) for row in rows]
        if not self.waiting:
            loop.call_later(0, self._answer_some)  # after all sockets have been read
            self._turned_at = 0.0
        self.waiting.extend(jobs)
        return [job.future for job in jobs]

    def _answer_some(self) -> None:
        """One batch; then the sockets are looked at again."""
        first = self.waiting[0].wish
        jobs: list[Any] = []
        while self.waiting and len(jobs) < self.classifier.most(first):
            if self.waiting[0].wish.tta != first.tta:
                break
            jobs.append(self.waiting.popleft())
        try:
            self.classifier.answer(jobs)
        except Exception as error:
            log.exception("a batch of %d tiles failed", len(jobs))
            for job in jobs:
                if not job.future.done():
                    job.future.set_exception(error)
        if self.waiting:
            asyncio.get_running_loop().call_later(0, self._answer_some)
        if len(jobs) == self.classifier.most(first):
            self._turned(time.monotonic())

    def _turned(self, now: float) -> None:
        if self._turned_at:
            turn_s = now - self._turned_at
            self._turn_s += OF_LATE * (turn_s - self._turn_s) if self._turn_s else turn_s
            self._best_turn_s = min(self._best_turn_s * FORGETS, self._turn_s)
        self._turned_at = now

    async def retire(self) -> None:
        """Wait until nobody is being answered by it, and give back what it holds."""
        while self.asked:
            self._idle.clear()
            await self._idle.wait()
        await asyncio.to_thread(self.classifier.close)
        self.files.close()
        await asyncio.to_thread(hardware.malloc_trim)


def load(uri: str, settings: Mapping[str, Any]) -> Live:
    """Ready to answer: loaded, warm, and checked on its own example.

    Raises:
        TrackingError: it cannot be had.
        CheckFailed: it must not answer anybody.
    """
    import mlflow.pyfunc
    from mlflow.artifacts import download_artifacts
    from mlflow.pyfunc import scoring_server

    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="eurosat-model-"))
        with tracking.translate_errors(uri):
            files = download_artifacts(uri, dst_path=folder)
        try:
            model = mlflow.pyfunc.load_model(files, model_config=dict(settings))
            classifier = model.unwrap_python_model()
            stack.callback(sys.modules.pop, type(classifier).__module__, None)
            _check(model, classifier)
        except CheckFailed:
            raise
        except Exception as error:  # its own code ran, and may have raised anything
            raise CheckFailed(f"it cannot be loaded ({type(error).__name__}: {error})") from error
        return Live(
            uri=uri,
            version=classifier.provenance["model_version"],
            model=model,
            classifier=classifier,
            app=scoring_server.init(model),
            files=stack.pop_all(),
        )


def _check(model: Any, classifier: Any) -> None:
    tile_HWC = np.full(classifier.shape_HWC, GREY, np.uint8)
    for count in WARM_TILES:
        answers = _answered(classifier, [tile_HWC] * count)[:1]
    if (example := model.input_example) is not None:
        answers += model.predict(example)
    expected = classifier.example_probabilities or ()
    for answer in answers:
        told = np.array(list(answer["probabilities"].values()))
        apart = float(np.abs(told - expected).max()) if len(told) == len(expected) else np.inf
        if not apart <= CHECK_TOLERANCE:
            raise CheckFailed(
                f"its example is answered {apart:.3f} away from what it was when it was "
                f"registered, over the {CHECK_TOLERANCE:g} allowed: register its run again"
            )


def _answered(classifier: Any, tiles: list[Any]) -> list[Any]:
    wish = classifier.wish({})
    jobs = [classifier.job(tile, wish, None, Future()) for tile in tiles]
    for start in range(0, len(jobs), most := classifier.most(wish)):
        classifier.answer(jobs[start : start + most])
    return [job.future.result() for job in jobs]


class Follower:
    """Keeps `live` the version that a reference names; an alias is asked for again and again."""

    def __init__(
        self, reference: str, settings: Mapping[str, Any], poll_s: float, metrics: Metrics
    ) -> None:
        self.reference, self._settings, self.poll_s = reference, dict(settings), poll_s
        self._metrics = metrics
        self.live: Live | None = None
        self.swaps = 0
        self.refused: dict[str, str] = {}
        """Versions that failed their check, each with why."""
        self._retiring: set[asyncio.Task[None]] = set()
        self._told = ""

    async def follow(self) -> None:
        """Until it is cancelled; what goes wrong is told once, and tried again."""
        while self.live is None or ALIAS.fullmatch(self.reference):
            await asyncio.sleep(self.poll_s)
            await self.step()

    async def step(self) -> None:
        """Ask which version it is, and have it answer."""
        try:
            uri = await asyncio.to_thread(self._wanted)
            if (self.live and self.live.uri == uri) or uri in self.refused:
                return
            log.info("loading %s", uri)
            try:
                new = await asyncio.to_thread(load, uri, self._settings)
            except CheckFailed as error:
                self.refused[uri] = " ".join(str(error).split())
                self._metrics.refused()
                log.error("%s gets no traffic: %s", uri, self.refused[uri])
                return
        except Exception as error:  # noqa: BLE001 - the version that answers goes on answering
            why = " ".join(str(error).split())[:300]
            if why != self._told:
                log.warning("%s cannot be had: %s", self.reference, why)
            self._told = why
            return
        self._told = ""
        self._swap(new)

    def _swap(self, new: Live) -> None:
        old, self.live = self.live, new
        self._metrics.swapped(old.labels if old else None, new.labels)
        form = new.classifier.form
        if old is None:
            log.info("%s answers (%s)", new.uri, form)
            return
        self.swaps += 1
        log.info("%s answers (%s); %s finishes what it began", new.uri, form, old.uri)
        task = asyncio.create_task(old.retire())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    def _wanted(self) -> str:
        """models:/NAME/NUMBER of an alias; another reference as it is."""
        from mlflow import MlflowClient

        alias = ALIAS.fullmatch(self.reference)
        if alias is None:
            return self.reference
        with tracking.translate_errors(self.reference):
            version = MlflowClient().get_model_version_by_alias(*alias.groups())
        return f"models:/{alias[1]}/{version.version}"

    async def close(self) -> None:
        """Let every version finish what it began."""
        live, self.live = self.live, None
        await asyncio.gather(*self._retiring, *([live.retire()] if live else []))
