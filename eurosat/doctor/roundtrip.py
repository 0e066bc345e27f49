"""A round trip: a run, a metric, an artifact and a model version, written, read and deleted."""

import hashlib
import math
import os
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from eurosat.doctor.checks import Failed, NotApplicable
from eurosat.doctor.context import Answer, Server, Visit
from eurosat.doctor.servers import API

PREFIX = "doctor-"
PROXY, PROXIED = "/api/2.0/mlflow-artifacts/artifacts/", "mlflow-artifacts:/"
ARTIFACT_BYTES = 2 * 2**20
"""Above 1 MiB, where a proxy that nobody has told of models (nginx) stops taking bodies."""
ARTIFACT_S = 30.0
ARRIVED_S = 1.0
"""After an interruption: what was on its way to the server then is there to be removed."""
DENIED = b"Permission denied"
"""MLflow's own word; it says that of a model that is not there, too, to all but administrators."""
GRANT = "let an administrator grant this account EDIT on what it makes, or look into the log"


@dataclass(kw_only=True)
class Trip:
    """What was made under one name of its own.

    It is removed by name: an answer that did not arrive may have told of something made.
    """

    server: Server
    name: str
    run_id: str = ""
    artifacts: str = ""
    """The run's place under the server's proxy; empty where it has none."""
    uploaded: bool = False
    model: bool = False
    """Whether a registered model was asked for."""
    gone: bool = False

    def remove(self) -> None:
        """All of it, the rest too where one part cannot be.

        Raises:
            Failed: something was left behind.
        """
        if self.gone:
            return
        left = []
        for part in (self._remove_artifact, self._remove_model, self._remove_experiment):
            try:
                part()
            except Failed as fault:
                left.append(str(fault))
        self.gone = True
        if left:
            raise Failed(
                f"{self.name} was left behind: {'; '.join(left)}",
                f"delete the experiment and the registered model {self.name} in MLflow's pages",
            )

    def _remove_artifact(self) -> None:
        if self.uploaded:
            answer = self.server.ask("DELETE", f"{PROXY}{self.artifacts}/{self.name}")
            taken(answer, "delete an artifact", 200, 204, 404)

    def _remove_model(self) -> None:
        if self.model:
            path, named = f"{API}/registered-models/", {"name": self.name}
            answer = self.server.ask("DELETE", f"{path}delete", json=named)
            allowed = [200, 404]
            if answer.status == 403:  # which MLflow also says of one that is not there
                answer, allowed = self.server.ask("GET", f"{path}get", params=named), [403, 404]
            taken(answer, "delete a registered model", *allowed)

    def _remove_experiment(self) -> None:
        """With its runs; MLflow keeps it among the deleted until `mlflow gc`."""
        named = {"experiment_name": self.name}
        found = self.server.ask("GET", f"{API}/experiments/get-by-name", params=named)
        if taken(found, "find an experiment", 200, 403, 404).ok:
            given = {"experiment_id": found.json()["experiment"]["experiment_id"]}
            answer = self.server.ask("POST", f"{API}/experiments/delete", json=given)
            taken(answer, "delete an experiment", 200)


def taken(answer: Answer, what: str, *statuses: int) -> Answer:
    """The answer, if its status is one of these.

    Raises:
        Failed: it is not.
    """
    if answer.status not in statuses:
        raise Failed(f"cannot {what}: {answer.said()}", GRANT)
    return answer


def post(server: Server, what: str, path: str, **sent: Any) -> dict[str, Any]:
    return taken(server.ask("POST", f"{API}/{path}", json=sent), what, 200).json()


def run(visit: Visit) -> str:
    """An experiment, a run and a metric of it."""
    server = visit.tracking
    trip = visit.trip = Trip(server=server, name=f"{PREFIX}{uuid.uuid4().hex[:12]}")
    visit.left.callback(_remove_quietly, trip)
    answer = server.ask("POST", f"{API}/experiments/create", json={"name": trip.name})
    if answer.status == 403:
        raise NotApplicable(
            f"{visit.user or 'this account'} may read and not write: it cannot create experiments"
        )
    experiment = taken(answer, "create an experiment", 200).json()["experiment_id"]
    now, value = int(time.time() * 1000), math.pi
    made = post(server, "create a run", "runs/create", experiment_id=experiment, start_time=now)
    trip.run_id = made["run"]["info"]["run_id"]
    place = str(made["run"]["info"]["artifact_uri"])
    if place.startswith(PROXIED):
        trip.artifacts = place.removeprefix(PROXIED).strip("/")
    post(
        server,
        "log a metric",
        "runs/log-metric",
        run_id=trip.run_id,
        key="doctor",
        value=value,
        timestamp=now,
        step=1,
    )
    told = server.ask("GET", f"{API}/runs/get", params={"run_id": trip.run_id})
    metrics = taken(told, "read a run", 200).json()["run"]["data"].get("metrics", [])
    if [(one["key"], one["value"], one["timestamp"]) for one in metrics] != [
        ("doctor", value, now)
    ]:
        raise Failed(f"a metric came back as {metrics}", "look into the server and its database")
    return f"experiment {trip.name}, a run, a metric: written and read back"


def artifact(visit: Visit) -> str:
    """Through the server's proxy to its bucket and back."""
    server, trip = visit.tracking, _trip(visit)
    if not trip.artifacts:
        raise NotApplicable("artifacts do not pass this server: it has no --serve-artifacts")
    content, path = os.urandom(ARTIFACT_BYTES), f"{PROXY}{trip.artifacts}/{trip.name}"
    trip.uploaded = True
    sent = server.ask("PUT", path, data=content, timeout_s=ARTIFACT_S)
    if sent.status >= 500:
        raise Failed(
            f"the server cannot store an artifact: {sent.said()}",
            "see that its object store runs, that the bucket is there and that it may write to it",
        )
    if sent.status == 413:
        raise Failed(
            f"{len(content):,} bytes are too many for a proxy before the server",
            "raise its limit of bodies (nginx: client_max_body_size 0)",
        )
    taken(sent, "upload an artifact", 200, 204)
    got = taken(server.ask("GET", path, timeout_s=ARTIFACT_S), "download an artifact", 200)
    ours, theirs = (hashlib.sha256(each).hexdigest() for each in (content, got.body))
    if ours != theirs:
        raise Failed(
            f"{len(content):,} bytes of sha256 {ours[:12]} came back as {len(got.body):,} of "
            f"{theirs[:12]}",
            "look at what lies between: a proxy, the bucket, its disk",
        )
    return f"{len(content):,} bytes, sha256 {ours[:12]} there and back"


def model_version(visit: Visit) -> str:
    server, trip = visit.tracking, _trip(visit)
    probe = server.ask("DELETE", f"{API}/registered-models/delete", json={"name": trip.name})
    if probe.status == 403 and probe.body.strip() != DENIED:  # whoever refuses stands before MLflow
        raise NotApplicable(f"what {visit.user} makes could not be deleted: {probe.said()}")
    trip.model = True
    answer = server.ask("POST", f"{API}/registered-models/create", json={"name": trip.name})
    if answer.status == 403:
        raise NotApplicable(f"{visit.user} may log runs and not register: it cannot create models")
    taken(answer, "create a registered model", 200)
    source = f"{PROXIED}{trip.artifacts}" if trip.artifacts else f"runs:/{trip.run_id}/model"
    post(
        server,
        "create a model version",
        "model-versions/create",
        name=trip.name,
        run_id=trip.run_id,
        source=source,
    )
    given = {"name": trip.name, "version": "1"}
    told = server.ask("GET", f"{API}/model-versions/get", params=given)
    version = taken(told, "read a model version", 200).json()["model_version"]
    if version["run_id"] != trip.run_id:
        raise Failed(f"a model version came back as {version}", "look into the server's database")
    return f"registered model {trip.name}, version 1: written and read back"


def removal(visit: Visit) -> str:
    """And a look whether it is gone."""
    if visit.trip is None:
        raise NotApplicable("nothing was made")
    trip = visit.trip
    trip.remove()
    found = trip.server.ask(
        "POST",
        f"{API}/experiments/search",
        json={"filter": f"name = '{trip.name}'", "max_results": 10},
    )
    if taken(found, "search experiments", 200).json().get("experiments"):
        raise Failed(f"{trip.name} is still there", "delete it in MLflow's pages")
    return f"{trip.name} is deleted; `mlflow gc` on the server frees its rows"


def _trip(visit: Visit) -> Trip:
    assert visit.trip is not None
    return visit.trip


def _remove_quietly(trip: Trip) -> None:
    """On the way out, where it was not yet removed; a server that is gone keeps what it has."""
    if trip.gone:
        return
    time.sleep(ARRIVED_S)
    with suppress(Failed):
        trip.remove()
