"""A round trip: a run, a metric, an artifact and a model version are written, read and deleted."""

import hashlib
import math
import os
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from eurosat.doctor.context import DoctorContext
from eurosat.doctor.findings import Failed, NotApplicable
from eurosat.doctor.http import Answer, HttpProbe
from eurosat.doctor.servers import API

PREFIX = "doctor-"
PROXY_PATH, PROXY_SCHEME = "/api/2.0/mlflow-artifacts/artifacts/", "mlflow-artifacts:/"
ARTIFACT_BYTES = 2 * 2**20
"""Above 1 MiB, the largest body that a proxy (nginx) accepts by default."""
ARTIFACT_TIMEOUT_S = 30.0
INTERRUPT_WAIT_S = 1.0
"""Wait after an interruption, so that the server finishes the requests that it has received."""
PERMISSION_DENIED = b"Permission denied"
"""MLflow's own answer of 403. Who is no administrator gets it for a missing model, too."""
GRANT_EDIT = "ask an administrator to grant this account EDIT, or look into the server's log"


@dataclass(kw_only=True)
class RoundTrip:
    """Objects on the tracking server, all under one unique name.

    They are deleted by name, because a request whose answer was lost may have created them.
    """

    name: str = field(default_factory=lambda: f"{PREFIX}{uuid.uuid4().hex[:12]}")
    run_id: str = ""
    artifact_folder: str = ""
    """Path of the run's artifacts behind the server's proxy; empty if it has no proxy."""
    started: bool = False
    has_artifact: bool = False
    has_model: bool = False
    """Whether a registered model was requested."""
    removed: bool = False

    def check_run(self, context: DoctorContext) -> str:
        """Create an experiment and a run, log a metric, and read it back."""
        server = context.tracking
        self.started = True
        context.cleanup.callback(self._remove_after_interrupt, server)
        answer = server.request("POST", f"{API}/experiments/create", json={"name": self.name})
        if answer.status == 403:
            account = context.username or "this account"
            raise NotApplicable(f"{account} can read but not write: it cannot create experiments")
        expect_status(answer, "create an experiment", 200)
        experiment_id = answer.json()["experiment_id"]
        now = int(time.time() * 1000)
        run = post(
            server, "create a run", "runs/create", experiment_id=experiment_id, start_time=now
        )
        info = run["run"]["info"]
        self.run_id, artifact_uri = info["run_id"], str(info["artifact_uri"])
        if artifact_uri.startswith(PROXY_SCHEME):
            self.artifact_folder = artifact_uri.removeprefix(PROXY_SCHEME).strip("/")
        metric = {"key": "doctor", "value": math.pi, "timestamp": now, "step": 1}
        post(server, "log a metric", "runs/log-metric", run_id=self.run_id, **metric)
        answer = server.request("GET", f"{API}/runs/get", params={"run_id": self.run_id})
        run = expect_status(answer, "read a run", 200).json()
        metrics = run["run"]["data"].get("metrics", [])
        if len(metrics) != 1 or {key: metrics[0][key] for key in metric} != metric:
            raise Failed(f"the metric came back as {metrics}", "check the server and its database")
        return f"experiment {self.name}, a run, a metric: written and read back"

    def check_artifact(self, context: DoctorContext) -> str:
        """Send an artifact through the server's proxy to its bucket, and read it back."""
        if not self.artifact_folder:
            raise NotApplicable("artifacts do not pass this server: it has no --serve-artifacts")
        server, timeout_s = context.tracking, ARTIFACT_TIMEOUT_S
        content, path = (
            os.urandom(ARTIFACT_BYTES),
            f"{PROXY_PATH}{self.artifact_folder}/{self.name}",
        )
        self.has_artifact = True
        answer = server.request("PUT", path, data=content, timeout_s=timeout_s)
        if answer.status >= 500:
            raise Failed(
                f"the server cannot store an artifact: {answer.summary()}",
                "check that its object store runs, and that the server may write to the bucket",
            )
        if answer.status == 413:
            raise Failed(
                f"a proxy before the server does not accept {len(content):,} bytes",
                "raise the proxy's limit of bodies (nginx: client_max_body_size 0)",
            )
        expect_status(answer, "upload an artifact", 200, 204)
        answer = server.request("GET", path, timeout_s=timeout_s)
        received = expect_status(answer, "download an artifact", 200).body
        sent_sha256, received_sha256 = map(_short_sha256, (content, received))
        if sent_sha256 != received_sha256:
            raise Failed(
                f"{len(content):,} bytes of sha256 {sent_sha256} came back as {len(received):,} of "
                f"{received_sha256}",
                "check what lies between: a proxy, the bucket, its disk",
            )
        return f"{len(content):,} bytes, sha256 {sent_sha256}: uploaded and downloaded"

    def check_model_version(self, context: DoctorContext) -> str:
        """Register a model with one version, and read it back.

        Only if the account may delete it: the platform's writers may register and not delete.
        """
        server, user, model = context.tracking, context.username, {"name": self.name}
        answer = server.request("DELETE", f"{API}/registered-models/delete", json=model)
        if answer.status == 403 and answer.body.strip() != PERMISSION_DENIED:
            # The refusal is not MLflow's but of a gate before it.
            raise NotApplicable(f"{user} could not delete what it creates: {answer.summary()}")
        self.has_model = True
        answer = server.request("POST", f"{API}/registered-models/create", json=model)
        if answer.status == 403:
            raise NotApplicable(f"{user} can log runs but not register: it cannot create models")
        expect_status(answer, "create a registered model", 200)
        source = f"runs:/{self.run_id}/model"
        if self.artifact_folder:
            source = f"{PROXY_SCHEME}{self.artifact_folder}"
        version = {"name": self.name, "run_id": self.run_id, "source": source}
        post(server, "create a model version", "model-versions/create", **version)
        key = {"name": self.name, "version": "1"}
        answer = server.request("GET", f"{API}/model-versions/get", params=key)
        version = expect_status(answer, "read a model version", 200).json()["model_version"]
        if version["run_id"] != self.run_id:
            raise Failed(f"the model version came back as {version}", "check the server's database")
        return f"registered model {self.name}, version 1: written and read back"

    def check_removal(self, context: DoctorContext) -> str:
        """Delete everything, and check that the server no longer lists it."""
        if not self.started:
            raise NotApplicable("nothing was created")
        self.remove(context.tracking)
        query = {"filter": f"name = '{self.name}'", "max_results": 10}
        if post(context.tracking, "search experiments", "experiments/search", **query).get(
            "experiments"
        ):
            raise Failed(f"{self.name} is still there", "delete it in MLflow's pages")
        return f"{self.name} is deleted; `mlflow gc` on the server frees its rows"

    def remove(self, server: HttpProbe) -> None:
        """Delete everything; a part that cannot be deleted does not stop the others.

        Raises:
            Failed: a part was left behind.
        """
        if self.removed:
            return
        faults = []
        for remove in (self._remove_artifact, self._remove_model, self._remove_experiment):
            try:
                remove(server)
            except Failed as fault:
                faults.append(str(fault))
        self.removed = True
        if faults:
            raise Failed(
                f"{self.name} was left behind: {'; '.join(faults)}",
                f"delete the experiment and the registered model {self.name} in MLflow's pages",
            )

    def _remove_artifact(self, server: HttpProbe) -> None:
        if self.has_artifact:
            path = f"{PROXY_PATH}{self.artifact_folder}/{self.name}"
            expect_status(server.request("DELETE", path), "delete an artifact", 200, 204, 404)

    def _remove_model(self, server: HttpProbe) -> None:
        if not self.has_model:
            return
        path, model, allowed = f"{API}/registered-models", {"name": self.name}, [200, 404]
        answer = server.request("DELETE", f"{path}/delete", json=model)
        if answer.status == 403:  # MLflow's answer also if the model is missing
            answer, allowed = server.request("GET", f"{path}/get", params=model), [403, 404]
        expect_status(answer, "delete a registered model", *allowed)

    def _remove_experiment(self, server: HttpProbe) -> None:
        """Delete the experiment with its runs; MLflow keeps it as deleted until `mlflow gc`."""
        key = {"experiment_name": self.name}
        answer = server.request("GET", f"{API}/experiments/get-by-name", params=key)
        if expect_status(answer, "find an experiment", 200, 403, 404).ok:
            experiment_id = answer.json()["experiment"]["experiment_id"]
            post(server, "delete an experiment", "experiments/delete", experiment_id=experiment_id)

    def _remove_after_interrupt(self, server: HttpProbe) -> None:
        """Delete everything if that was not done; a server that is down keeps what it has."""
        if self.removed:
            return
        time.sleep(INTERRUPT_WAIT_S)
        with suppress(Failed):
            self.remove(server)


def expect_status(answer: Answer, action: str, *statuses: int) -> Answer:
    """Return ``answer`` if its status is one of ``statuses``.

    Raises:
        Failed: the status is another one.
    """
    if answer.status not in statuses:
        raise Failed(f"cannot {action}: {answer.summary()}", GRANT_EDIT)
    return answer


def post(server: HttpProbe, action: str, path: str, **payload: Any) -> dict[str, Any]:
    """Send a request to MLflow's REST API and return the JSON object of its answer."""
    answer = server.request("POST", f"{API}/{path}", json=payload)
    return expect_status(answer, action, 200).json()


def _short_sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
