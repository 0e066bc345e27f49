"""Searches over many runs, through the REST API of the platform's MLflow."""

import io
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import requests
from numpy.typing import NDArray

from benchmarks.platform.fixture import PlatformFixture
from eurosat.errors import TrackingError
from eurosat.runtime.progress import track

EXPERIMENT = "bench-platform-search"
METRICS, PARAMS, TAGS = 100, 10, 3
GROUPS = 10
"""Number of values of the param ``p0``: a tenth of the runs has each."""
CHUNK_RUNS = 500
TIMEOUT_S = 120
PAGE, LARGE_PAGE = 100, 1000
"""Runs per page."""


class Searcher:
    """A user who searches the runs of an experiment."""

    def __init__(
        self, platform: PlatformFixture, login: tuple[str, str], experiment_id: str
    ) -> None:
        self._session = requests.Session()
        self._session.auth = login
        self._url = f"{platform.url}/api/2.0/mlflow/runs/search"
        self._experiment_id = experiment_id

    def search(self, **query: Any) -> dict[str, Any]:
        """Search runs, and return the JSON answer.

        Raises:
            requests.RequestException: there is no answer, or it is an error.
        """
        body = {"experiment_ids": [self._experiment_id], **query}
        response = self._session.post(self._url, json=body, timeout=TIMEOUT_S)
        response.raise_for_status()
        payload: dict[str, Any] = response.json()
        return payload


@dataclass(frozen=True)
class SearchKind:
    """One kind of search. Both functions take the number of a metric."""

    name: str
    query: Callable[[int], dict[str, Any]]
    num_matches: Callable[[NDArray[np.float64], int], int]
    """Return how many runs match, before paging, from their metrics (runs, METRICS)."""
    page: int = PAGE


SEARCH_KINDS = (
    SearchKind(
        "filter by a metric",
        lambda m: {"filter": f"metrics.m{m:02} > 0.99"},
        lambda values_RM, m: int((values_RM[:, m] > 0.99).sum()),
    ),
    SearchKind(
        "order by a metric",
        lambda m: {"order_by": [f"metrics.m{m:02} DESC"]},
        lambda values_RM, m: len(values_RM),
    ),
    SearchKind(
        "filter by metric and param, order by metric",
        lambda m: {
            "filter": f"metrics.m{m:02} > 0.5 AND params.p0 = '{m % GROUPS}'",
            "order_by": [f"metrics.m{m:02} DESC"],
        },
        lambda values_RM, m: int((values_RM[m % GROUPS :: GROUPS, m] > 0.5).sum()),
    ),
    SearchKind(
        "the latest, a page of 1,000",
        lambda m: {"order_by": ["attributes.start_time DESC"]},
        lambda values_RM, m: len(values_RM),
        page=LARGE_PAGE,
    ),
    SearchKind(
        "order by a metric, a page of 1,000",
        lambda m: {"order_by": [f"metrics.m{m:02} DESC"]},
        lambda values_RM, m: len(values_RM),
        page=LARGE_PAGE,
    ),
)


def fill(platform: PlatformFixture, runs: int) -> tuple[str, NDArray[np.float64]]:
    """Create an experiment with ``runs`` runs; return its id and their metrics (runs, METRICS)."""
    admin = platform.administrator()
    created = admin.request("POST", "2.0/mlflow/experiments/create", name=EXPERIMENT) or {}
    experiment_id = str(created["experiment_id"])
    values_RM = np.random.default_rng(0).random((runs, METRICS))
    connection = platform.connection()
    try:
        cursor = connection.cursor()
        chunks = list(range(0, runs, CHUNK_RUNS))
        for first in track(chunks, len(chunks), f"writing runs of {METRICS} metrics", "chunks"):
            for table, rows in _tables(experiment_id, first, values_RM[first : first + CHUNK_RUNS]):
                columns = ", ".join(rows[0])
                text = "".join("\t".join(map(str, row.values())) + "\n" for row in rows)
                cursor.copy_expert(f"COPY {table} ({columns}) FROM STDIN", io.StringIO(text))
        cursor.execute("VACUUM ANALYZE")
    finally:
        connection.close()
    return experiment_id, values_RM


def _tables(
    experiment_id: str, first: int, values_RM: NDArray[np.float64]
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield rows of MLflow's tables; a run's start time and ``p0`` contain its number."""
    start_ms = 1_700_000_000_000
    numbered = [(first + i, uuid.uuid4().hex) for i in range(len(values_RM))]
    yield (
        "runs",
        [
            {
                "run_uuid": run_id,
                "name": f"run {number}",
                "experiment_id": experiment_id,
                "status": "FINISHED",
                "lifecycle_stage": "active",
                "source_type": "UNKNOWN",
                "source_name": "",
                "entry_point_name": "",
                "source_version": "",
                "user_id": "bench",
                "start_time": start_ms + number,
                "end_time": start_ms + number + 1,
                "artifact_uri": f"mlflow-artifacts:/{experiment_id}/{run_id}/artifacts",
            }
            for number, run_id in numbered
        ],
    )
    params = [
        {"run_uuid": run_id, "key": f"p{p}", "value": (number + p) % GROUPS}
        for number, run_id in numbered
        for p in range(PARAMS)
    ]
    yield "params", params
    tags = [
        {"run_uuid": run_id, "key": f"t{t}", "value": number}
        for number, run_id in numbered
        for t in range(TAGS)
    ]
    yield "tags", tags
    metrics = [
        {
            "run_uuid": run_id,
            "key": f"m{m:02}",
            "value": repr(float(value)),
            "step": 0,
            "timestamp": start_ms + number,
            "is_nan": "f",
        }
        for (number, run_id), values_M in zip(numbered, values_RM, strict=True)
        for m, value in enumerate(values_M)
    ]
    yield "metrics", metrics
    yield "latest_metrics", metrics


def time_searches(
    searcher: Searcher, values_RM: NDArray[np.float64], rounds: int
) -> dict[str, Sequence[float]]:
    """Return the milliseconds of each search, by kind; a first round is not counted.

    Raises:
        TrackingError: an answer has another number of runs than match.
    """
    durations_ms: dict[str, list[float]] = {kind.name: [] for kind in SEARCH_KINDS}
    for number in track(range(rounds + 1), rounds + 1, "searching", "rounds"):
        for kind in SEARCH_KINDS:
            started = time.perf_counter()
            payload = searcher.search(max_results=kind.page, **kind.query(number))
            took_ms = 1000 * (time.perf_counter() - started)
            expected = min(kind.page, kind.num_matches(values_RM, number))
            if (found := len(payload.get("runs", []))) != expected:
                raise TrackingError(f"{kind.name}: {found} of {expected} runs were found")
            if number:
                durations_ms[kind.name].append(took_ms)
    return dict(durations_ms)
