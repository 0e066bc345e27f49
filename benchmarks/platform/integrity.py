"""What of that which was acknowledged is in the database and in the bucket."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.platform.fixture import Stand
from benchmarks.platform.writer import EXPERIMENT
from eurosat.runtime.progress import track
from eurosat.tracking.journal import PREFIX

Point = tuple[str, int, float]
"""Name, step and value of a metric."""


@dataclass
class Acknowledged:
    """Of one run, what its writer's calls have returned from."""

    points: list[Point] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    """sha256 by path."""


@dataclass
class Held:
    """Of one run, what the platform has."""

    points: list[Point]
    params: dict[str, str]
    digest: Callable[[str], str | None]
    """sha256 of the artifact at a path; None where there is none."""


def read(lines: Iterable[str]) -> dict[str, Acknowledged]:
    """A writer's record, by the id of the journal."""
    found: defaultdict[str, Acknowledged] = defaultdict(Acknowledged)
    for line in lines:
        told = json.loads(line)
        one = found[told["journal"].removeprefix(PREFIX)]
        one.points += [(key, told["step"], v) for key, v in told.get("metrics", {}).items()]
        one.params |= told.get("params", {})
        if "path" in told:
            one.files[told["path"]] = told["sha256"]
    return dict(found)


def compare(told: Acknowledged, held: Held | None) -> Counter[str]:
    """What was acknowledged, and ``lost`` of it; ``twice`` are points that nobody logged.

    A run that is not there has lost itself too.
    """
    found = Counter(
        runs=1, points=len(told.points), params=len(told.params), artifacts=len(told.files)
    )
    if held is None:
        found["lost"] = found.total()
        return found
    there = set(held.points)
    lost = [point for point in told.points if point not in there]
    found["lost"] = len(lost) + len(told.params.items() - held.params.items())
    found["lost"] += sum(held.digest(path) != sha256 for path, sha256 in told.files.items())
    found["twice"] = len(held.points) - (len(told.points) - len(lost))
    return found


def counted(stand: Stand, records: Sequence[Path]) -> Counter[str]:
    """All runs of all writers; ``stuck`` are those that are not FINISHED."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    name, _, root = stand.env["EUROSAT_ARTIFACTS"].removeprefix("gs://").partition("/")
    endpoint = {"api_endpoint": stand.env["STORAGE_EMULATOR_HOST"]}
    nobody = AnonymousCredentials()  # type: ignore[no-untyped-call]
    made = storage.Client("bench", nobody, client_options=endpoint)
    bucket, connection = made.bucket(name), stand.connection()
    cursor = connection.cursor()
    try:
        runs, found = _runs(cursor), Counter[str]()
        found["stuck"] = sum(status != "FINISHED" for _, status, _ in runs.values())
        for record in track(records, len(records), "comparing", "records"):
            for journal, told in read(record.read_text().splitlines()).items():
                held = _held(cursor, bucket, root, runs[journal]) if journal in runs else None
                found += compare(told, held)
                found["stuck"] += held is None
    finally:
        connection.close()
        made.close()
    return found


def _runs(cursor: Any) -> Mapping[str, tuple[str, str, str]]:
    """Id, status and place of the artifacts by the journal's id.

    A second run of the same journal is stuck, as nobody will end it: its key is its own id.
    """
    cursor.execute(
        "SELECT coalesce(t.value, r.run_uuid), r.run_uuid, r.status, r.artifact_uri FROM runs r "
        "JOIN experiments e USING (experiment_id) LEFT JOIN tags t ON t.run_uuid = r.run_uuid "
        "AND t.key = 'journal.id' WHERE e.name = %s AND r.lifecycle_stage = 'active' "
        "ORDER BY r.start_time, r.run_uuid",
        (EXPERIMENT,),
    )
    found: dict[str, tuple[str, str, str]] = {}
    for journal, run_id, status, place in cursor.fetchall():
        if journal in found:
            found[run_id] = (run_id, "made twice", place)
        else:
            found[journal] = (run_id, status, place)
    return found


def _held(cursor: Any, bucket: Any, root: str, run: tuple[str, str, str]) -> Held:
    from google.api_core.exceptions import NotFound

    run_id, _, place = run
    cursor.execute("SELECT key, step, value FROM metrics WHERE run_uuid = %s", (run_id,))
    points = cursor.fetchall()
    cursor.execute("SELECT key, value FROM params WHERE run_uuid = %s", (run_id,))
    folder = f"{root}/{place.partition(':/')[2].strip('/')}"

    def digest(path: str) -> str | None:
        try:
            content = bucket.blob(f"{folder}/{path}").download_as_bytes()
        except NotFound:
            return None
        return hashlib.sha256(content).hexdigest()

    return Held(points=points, params=dict(cursor.fetchall()), digest=digest)
