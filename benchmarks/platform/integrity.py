"""Compare what the writers got acknowledged with the database and the bucket."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.platform.fixture import PlatformFixture
from benchmarks.platform.writer import EXPERIMENT
from eurosat.runtime.progress import track
from eurosat.tracking.journal import PREFIX

Point = tuple[str, int, float]
"""Name, step and value of a metric's point."""


@dataclass
class Acknowledged:
    """The data of one run whose logging calls have returned."""

    points: list[Point] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    """sha256 by artifact path."""


@dataclass
class Stored:
    """The data of one run that the platform has stored."""

    points: list[Point]
    params: dict[str, str]
    digest: Callable[[str], str | None]
    """Return the sha256 of an artifact by its path; None if it is missing."""


def read(lines: Iterable[str]) -> dict[str, Acknowledged]:
    """Parse a writer's record; return the acknowledged data by journal id."""
    runs: defaultdict[str, Acknowledged] = defaultdict(Acknowledged)
    for line in lines:
        entry = json.loads(line)
        run = runs[entry["journal"].removeprefix(PREFIX)]
        run.points += [(key, entry["step"], v) for key, v in entry.get("metrics", {}).items()]
        run.params |= entry.get("params", {})
        if "path" in entry:
            run.files[entry["path"]] = entry["sha256"]
    return dict(runs)


def compare(acknowledged: Acknowledged, stored: Stored | None) -> Counter[str]:
    """Count what was acknowledged, what of it is ``lost``, and surplus points (``twice``).

    A missing run counts as lost too, with all its data.
    """
    points, params, files = acknowledged.points, acknowledged.params, acknowledged.files
    counts = Counter(runs=1, points=len(points), params=len(params), artifacts=len(files))
    if stored is None:
        counts["lost"] = counts.total()
        return counts
    stored_points = set(stored.points)
    num_lost_points = sum(point not in stored_points for point in points)
    num_lost_params = len(params.items() - stored.params.items())
    num_lost_files = sum(stored.digest(path) != sha256 for path, sha256 in files.items())
    counts["lost"] = num_lost_points + num_lost_params + num_lost_files
    counts["twice"] = len(stored.points) - (len(points) - num_lost_points)
    return counts


def count(platform: PlatformFixture, records: Sequence[Path]) -> Counter[str]:
    """Sum `compare` over all runs of all writers; ``stuck`` counts runs that are not FINISHED."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    name, _, root = platform.env["EUROSAT_ARTIFACTS"].removeprefix("gs://").partition("/")
    endpoint = {"api_endpoint": platform.env["STORAGE_EMULATOR_HOST"]}
    anonymous = AnonymousCredentials()  # type: ignore[no-untyped-call]
    client = storage.Client("bench", anonymous, client_options=endpoint)
    bucket, connection = client.bucket(name), platform.connection()
    cursor = connection.cursor()
    try:
        runs, counts = _runs(cursor), Counter[str]()
        counts["stuck"] = sum(status != "FINISHED" for _, status, _ in runs.values())
        for record in track(records, len(records), "comparing", "records"):
            for journal, acknowledged in read(record.read_text().splitlines()).items():
                run = runs.get(journal)
                stored = _stored(cursor, bucket, root, run) if run else None
                counts += compare(acknowledged, stored)
                counts["stuck"] += stored is None
    finally:
        connection.close()
        client.close()
    return counts


def _runs(cursor: Any) -> Mapping[str, tuple[str, str, str]]:
    """Return run id, status and artifact location by journal id.

    A second run of the same journal gets the status ``made twice`` and its own id as the key: it
    counts as stuck, as nobody will end it.
    """
    cursor.execute(
        "SELECT coalesce(t.value, r.run_uuid), r.run_uuid, r.status, r.artifact_uri FROM runs r "
        "JOIN experiments e USING (experiment_id) LEFT JOIN tags t ON t.run_uuid = r.run_uuid "
        "AND t.key = 'journal.id' WHERE e.name = %s AND r.lifecycle_stage = 'active' "
        "ORDER BY r.start_time, r.run_uuid",
        (EXPERIMENT,),
    )
    runs: dict[str, tuple[str, str, str]] = {}
    for journal, run_id, status, location in cursor.fetchall():
        if journal in runs:
            runs[run_id] = (run_id, "made twice", location)
        else:
            runs[journal] = (run_id, status, location)
    return runs


def _stored(cursor: Any, bucket: Any, root: str, run: tuple[str, str, str]) -> Stored:
    from google.api_core.exceptions import NotFound

    run_id, _, location = run
    cursor.execute("SELECT key, step, value FROM metrics WHERE run_uuid = %s", (run_id,))
    points = cursor.fetchall()
    cursor.execute("SELECT key, value FROM params WHERE run_uuid = %s", (run_id,))
    folder = f"{root}/{location.partition(':/')[2].strip('/')}"

    def digest(path: str) -> str | None:
        try:
            content = bucket.blob(f"{folder}/{path}").download_as_bytes()
        except NotFound:
            return None
        return hashlib.sha256(content).hexdigest()

    return Stored(points=points, params=dict(cursor.fetchall()), digest=digest)
