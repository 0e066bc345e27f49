"""The doctor's findings about real servers: healthy, faulty, foreign, silent or refusing us."""

import contextlib
import hashlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import requests
import uvicorn
from cryptography.fernet import Fernet

from eurosat.data.pack import dataset_fingerprint
from eurosat.data.sources import SyntheticSource, open_source
from eurosat.doctor import __main__ as doctor
from eurosat.doctor import host, roundtrip, servers
from eurosat.doctor.checks import Check, run_checks
from eurosat.doctor.context import DoctorContext
from eurosat.doctor.findings import Failed, Finding, NotApplicable
from eurosat.doctor.http import HttpProbe
from eurosat.runtime import cli, exit_codes
from registry import receiver, versions, webhooks, worker
from registry.event_queue import EventQueue
from tests.support.http_server import listening
from tests.support.mlflow_server import Proxy, free_port, mlflow_server, proxy
from tests.support.object_stores import fake_gcs_server, make_bucket
from tests.support.paths import ROOT
from tests.support.recipes import TINY
from tests.support.registry import MLFLOW_WARNS
from tests.support.serving import until

pytestmark = MLFLOW_WARNS
PASSWORD = "twelve or more"
WEBHOOK_SECRET = "between the two"
TIMEOUT_S, MAX_TOTAL_S = 0.5, 60.0
"""Limits of one request, and of all checks against servers that never answer."""
LOCAL_CHECKS = {"interpreter", "lock", "torch", "cores", "gpu", "tiles", "disk", "secrets"}


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the settings of a platform, tiles or secrets that this machine may have."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "MLFLOW_TRACKING_URI",
        "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD",
        "EUROSAT_ROOT",
        "EUROSAT_SECRETS",
        "EUROSAT_SERVING_URL",
        "EUROSAT_PROMOTER_URL",
        "EUROSAT_ARTIFACTS",
        "STORAGE_EMULATOR_HOST",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    folder = tmp_path_factory.mktemp("open")
    with mlflow_server(folder) as port:
        yield port, folder


@pytest.fixture(scope="module")
def closed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Run MLflow with basic authentication: an admin, a user ada, webhooks to loopback."""
    folder = tmp_path_factory.mktemp("closed")
    (folder / "auth.ini").write_text(
        "[mlflow]\ndefault_permission = READ\nadmin_username = admin\n"
        f"database_uri = sqlite:///{folder}/auth.db\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        "auth_cache_ttl_seconds = 600\n"  # verifying a password takes 0.1 s
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
            "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "of the tests",
            "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
            "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
            "MLFLOW_WEBHOOK_REQUEST_MAX_RETRIES": "0",
            "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": Fernet.generate_key().decode(),
        }.items():
            patch.setenv(name, value)
        with mlflow_server(folder, None, "--app-name=basic-auth") as port:
            requests.post(
                f"http://127.0.0.1:{port}/api/2.0/mlflow/users/create",
                auth=("admin", PASSWORD),
                json={"username": "ada", "password": PASSWORD},
                timeout=30,
            ).raise_for_status()
            yield port


Examine = Callable[..., dict[str, Finding]]


@pytest.fixture
def examine(monkeypatch: pytest.MonkeyPatch) -> Examine:
    """Return a function that runs the named checks and those that they need."""

    def run(
        *names: str, context: DoctorContext | None = None, **variables: str
    ) -> dict[str, Finding]:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        checks = [check for check in doctor.all_checks() if check.name in with_needs(names)]
        with context or DoctorContext() as entered:
            findings = run_checks(checks, entered, lambda finding: None)
        return {finding.name: finding for finding in findings}

    return run


def with_needs(names: tuple[str, ...]) -> set[str]:
    selected = set(names)
    for check in reversed(doctor.all_checks()):
        if check.name in selected:
            selected |= set(check.needs)
    return selected


def as_user(name: str, port: int, password: str = PASSWORD) -> dict[str, str]:
    return {
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}",
        "MLFLOW_TRACKING_USERNAME": name,
        "MLFLOW_TRACKING_PASSWORD": password,
    }


ROUND_TRIP = ("run and metric", "artifact", "model version", "removal")


def left_behind(port: int, auth: tuple[str, str] | None = None) -> list[str]:
    """Return the doctor's experiments and registered models that the server still lists."""
    url, limit = f"http://127.0.0.1:{port}/api/2.0/mlflow", {"max_results": 1000}
    answers = (
        requests.post(f"{url}/experiments/search", auth=auth, timeout=30, json=limit),
        requests.get(f"{url}/registered-models/search", auth=auth, timeout=30, params=limit),
    )
    names = []
    for answer in answers:
        answer.raise_for_status()
        names += [entry["name"] for entries in answer.json().values() for entry in entries]
    return [name for name in names if name.startswith(roundtrip.PREFIX)]


# The runner


def test_a_check_that_raises_fails_alone_and_each_finding_is_reported_at_once() -> None:
    def breaks(context: DoctorContext) -> str:
        raise ZeroDivisionError("of http://me:secret@server")

    def fails(context: DoctorContext) -> str:
        raise Failed("it is ill", "a remedy")

    def does_not_apply(context: DoctorContext) -> str:
        raise NotApplicable("nothing here")

    reported: list[Finding] = []
    checks = (
        Check("breaks", breaks),
        Check("after it", lambda context: f"{len(reported)} reported"),
        Check("ill", fails),
        Check("needs ill", lambda context: "never", needs=("ill",)),
        Check("absent", does_not_apply),
        Check("needs absent", lambda context: "never", needs=("absent",)),
    )
    findings = run_checks(checks, DoctorContext(), reported.append)
    assert reported == findings
    assert [(finding.verdict, finding.message) for finding in findings] == [
        ("failed", "ZeroDivisionError: of http://me:***@server"),
        ("ok", "1 reported"),
        ("failed", "it is ill"),
        ("n/a", "ill failed"),
        ("n/a", "nothing here"),
        ("n/a", "nothing here"),
    ]
    for finding in findings:
        assert bool(finding.remedy) == (finding.verdict == "failed")


def test_a_slow_check_is_reported_while_it_runs(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("eurosat.doctor.checks.FIRST_NOTICE_S", 0.05)

    def slow(context: DoctorContext) -> str:
        time.sleep(0.3)
        return "done"

    run_checks((Check("slow", slow),), DoctorContext(), lambda finding: None)
    assert "... slow: 0 s so far" in capfd.readouterr().err


def test_the_docs_list_exactly_the_checks_that_run() -> None:
    lines = (ROOT / "docs" / "doctor.md").read_text().splitlines()
    rows = [line.split("|")[1].strip(" `") for line in lines if line.startswith("| `")]
    assert rows == doctor.NAMES


# This machine


def test_without_a_platform_no_check_fails_and_no_file_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main([]) == exit_codes.OK
    lines = capsys.readouterr().out.splitlines()
    verdicts = {line[8:].split("  ")[0].strip(): line.split()[0] for line in lines[:-1]}
    assert list(verdicts) == doctor.NAMES
    assert {name for name, verdict in verdicts.items() if verdict == "ok"} <= LOCAL_CHECKS
    assert not list(tmp_path.iterdir()), "checking for a store must not create one"
    assert doctor.main(["--json"]) == exit_codes.OK
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is True
    assert {check["name"]: check["verdict"] for check in answer["checks"]} == verdicts


def test_a_package_that_differs_from_the_lock_is_named(tmp_path: Path, examine: Examine) -> None:
    lock = tmp_path / "requirements.lock"
    hashed = " \\\n    --hash=sha256:00\n    # via nobody\n"
    lock.write_text(
        f"numpy==1.0.0{hashed}absent-package==2{hashed}"
        f'winonly==1 ; sys_platform == "win32"{hashed}pytest=={pytest.__version__}{hashed}'
    )
    finding = examine("lock", context=DoctorContext(lock_file=lock))["lock"]
    assert finding.verdict == "failed"
    assert "2 of 3 packages differ" in finding.message
    assert "not 1.0.0" in finding.message
    assert "absent-package missing, not 2" in finding.message
    finding = examine("lock", context=DoctorContext(lock_file=tmp_path / "none"))["lock"]
    assert finding.verdict == "n/a"


def test_more_threads_than_cores_fail(tmp_path: Path, examine: Examine) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4096)
        finding = examine("cores")["cores"]
    finally:
        torch.set_num_threads(before)
    assert finding.verdict == "failed"
    assert "OMP_NUM_THREADS=" in finding.remedy
    assert host.cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert host.cpu_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert host.cpu_quota(tmp_path) is None


def test_a_disk_with_less_than_the_required_space_fails(examine: Examine) -> None:
    assert examine("disk", context=DoctorContext(min_free_gb=0))["disk"].verdict == "ok"
    finding = examine("disk", context=DoctorContext(min_free_gb=1e9))["disk"]
    assert finding.verdict == "failed"
    assert "1e+09 GB are required" in finding.message


def test_secrets_that_others_can_read_fail_and_the_remedy_mends_it(
    tmp_path: Path, examine: Examine
) -> None:
    folder = tmp_path / "the secrets"
    folder.mkdir(mode=0o755)
    (folder / "key").write_text("s")
    (folder / "key").chmod(0o644)
    finding = examine("secrets", EUROSAT_SECRETS=str(folder))["secrets"]
    assert finding.verdict == "failed"
    assert f"{folder / 'key'} has mode 644" in finding.message
    subprocess.run(shlex.split(finding.remedy), check=True)
    assert examine("secrets")["secrets"].verdict == "ok"
    (folder / "key").chmod(0o644)
    folder.chmod(0o700)
    assert examine("secrets")["secrets"].verdict == "ok", "others cannot enter the folder"
    env = tmp_path / ".platform" / "env"
    env.parent.mkdir()
    env.write_text("A=b\n")
    env.chmod(0o640)
    finding = examine("secrets")["secrets"]
    assert finding.verdict == "failed"
    assert ".platform/env has mode 640" in finding.message
    env.chmod(0o600)
    assert examine("secrets")["secrets"].message == "2 files, readable by their owner alone"
    assert examine("secrets", EUROSAT_SECRETS="none")["secrets"].verdict == "failed"


def write_tiles(folder: Path) -> None:
    from eurosat.config import compose

    source = open_source(compose(TINY).data)
    assert isinstance(source, SyntheticSource)
    for path in source.paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(source.read(path))


def test_tiles_are_compared_with_the_genuine_data_set(
    tmp_path: Path, examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = examine("tiles", EUROSAT_ROOT=str(tmp_path / "none"))["tiles"]
    assert finding.verdict == "failed"
    assert "no EuroSAT tiles under" in finding.message
    folder = tmp_path / "EuroSAT_RGB"
    write_tiles(folder)
    finding = examine("tiles", EUROSAT_ROOT=str(tmp_path))["tiles"]
    assert finding.verdict == "failed"
    assert "AnnualCrop 20, not 3000" in finding.message
    monkeypatch.setattr(host, "EUROSAT_CLASSES", dict.fromkeys(host.EUROSAT_CLASSES, 20))
    assert "some tiles were changed" in examine("tiles")["tiles"].message
    files = sorted(folder.rglob("*.jpg"))
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    paths = [str(file.relative_to(folder)) for file in files]
    monkeypatch.setattr(host, "EUROSAT_RGB", dataset_fingerprint(paths, digests))
    assert examine("tiles")["tiles"].verdict == "ok"


@pytest.mark.real_data
def test_the_genuine_tiles_are_recognised(eurosat_root: Path, examine: Examine) -> None:
    finding = examine("tiles", EUROSAT_ROOT=str(eurosat_root))["tiles"]
    assert finding.verdict == "ok"
    assert "27,000 tiles of 10 classes" in finding.message


def test_constants_agree_with_their_other_definitions() -> None:
    reference = json.loads((ROOT / "expectations" / "reference" / "eurosat.json").read_text())
    assert reference["classes"] == host.EUROSAT_CLASSES
    assert host.EUROSAT_RGB in (ROOT / "tests" / "eurosat" / "data" / "test_pack.py").read_text()
    assert (servers.MODEL, servers.CHAMPION) == (versions.MODEL, versions.CHAMPION)
    assert servers.WEBHOOK == webhooks.NAME
    (major, oldest), (_, newest) = host.PYTHONS[0], host.PYTHONS[-1]
    bounds = f'requires-python = ">={major}.{oldest},<{major}.{newest + 1}"'
    assert bounds in (ROOT / "pyproject.toml").read_text()


# The tracking server


def test_a_server_without_accounts_passes_and_is_left_as_it_was(
    open_server: tuple[int, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port, folder = open_server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}/")
    assert doctor.main(["--json"]) == exit_codes.OK
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    for name in ("tracking server", "version", "credentials", *ROUND_TRIP, "clock"):
        assert checks[name]["verdict"] == "ok", checks[name]
    assert checks["credentials"]["message"] == "the server asks for no credentials"
    assert checks["webhook"]["verdict"] == "n/a"
    assert not left_behind(port)
    assert not [file for file in (folder / "artifacts").rglob("*") if file.is_file()]


def test_a_user_passes_the_round_trip_and_sees_no_webhooks(
    closed_server: int, examine: Examine
) -> None:
    findings = examine(*ROUND_TRIP, "webhook", **as_user("ada", closed_server))
    assert {findings[name].verdict for name in ROUND_TRIP} == {"ok"}, findings
    assert findings["credentials"].message == "ada"
    assert findings["webhook"].verdict == "n/a"
    assert not left_behind(closed_server, ("admin", PASSWORD))


@pytest.mark.parametrize(("name", "state"), [("ada", "refused"), ("", "required, and none are")])
def test_wrong_or_missing_credentials_fail_one_check_alone(
    name: str, state: str, closed_server: int, examine: Examine
) -> None:
    variables = as_user(name, closed_server, "wrong but long enough" if name else "")
    findings = examine(*ROUND_TRIP, "webhook", "clock", **variables)
    assert findings["credentials"].verdict == "failed"
    assert f"credentials are {state}" in findings["credentials"].message
    assert "MLFLOW_TRACKING_PASSWORD" in findings["credentials"].remedy
    assert {findings[check].verdict for check in (*ROUND_TRIP, "webhook")} == {"n/a"}
    assert findings["clock"].verdict == "ok"


def refusing(*calls: tuple[str, str], status: int = 403) -> Callable[[int, str, str], int | None]:
    def refuse(number: int, method: str, path: str) -> int | None:
        refused = any(method == verb and part in path for verb, part in calls)
        return status if refused else None

    return refuse


@pytest.fixture
def between(open_server: tuple[int, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Put a proxy before the server without accounts and use it as the tracking server."""
    with proxy(open_server[0]) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        yield server


def test_an_account_that_can_only_read_does_not_fail(between: Proxy, examine: Examine) -> None:
    between.status_for = refusing(("POST", "experiments/create"))
    findings = examine(*ROUND_TRIP)
    assert {findings[name].verdict for name in ROUND_TRIP[:3]} == {"n/a"}
    assert findings["removal"].verdict == "ok"
    assert "can read but not write" in findings["run and metric"].message


def test_no_model_is_created_that_could_not_be_deleted(
    between: Proxy, examine: Examine, open_server: tuple[int, Path]
) -> None:
    """A gate before MLflow refuses the platform's writers, who are not promoters, to delete."""
    between.status_for = refusing(("DELETE", "registered-models/delete"))
    findings = examine(*ROUND_TRIP)
    assert findings["model version"].verdict == "n/a"
    assert "could not delete what it creates" in findings["model version"].message
    assert findings["removal"].verdict == "ok"
    assert not left_behind(open_server[0])


@pytest.mark.parametrize(
    ("call", "name", "message"),
    [
        (("POST", "runs/log-metric"), "run and metric", "cannot log a metric: 500"),
        (("PUT", "mlflow-artifacts"), "artifact", "cannot store an artifact: 500"),
        (("GET", "mlflow-artifacts"), "artifact", "cannot download an artifact: 500"),
        (("POST", "model-versions/create"), "model version", "cannot create a model version: 500"),
    ],
)
def test_a_failed_step_is_named_and_cleaned_up(
    call: tuple[str, str],
    name: str,
    message: str,
    between: Proxy,
    examine: Examine,
    open_server: tuple[int, Path],
) -> None:
    between.status_for = refusing(call, status=500)
    between.forward_before_status = True  # the object is created all the same
    findings = examine(*ROUND_TRIP)
    assert findings[name].verdict == "failed"
    assert message in findings[name].message
    assert findings["removal"].verdict == "ok"
    assert not left_behind(open_server[0])
    assert not [file for file in (open_server[1] / "artifacts").rglob("*") if file.is_file()]


def test_an_artifact_that_comes_back_changed_fails(between: Proxy, examine: Examine) -> None:
    between.alter_body = lambda path, body: body[:-1] if "mlflow-artifacts" in path else body
    findings = examine(*ROUND_TRIP)
    assert findings["artifact"].verdict == "failed"
    assert "came back as 2,097,151 of" in findings["artifact"].message
    assert findings["model version"].verdict == "ok"


def test_an_object_that_cannot_be_deleted_is_named(
    between: Proxy, examine: Examine, open_server: tuple[int, Path]
) -> None:
    between.status_for = refusing(("POST", "experiments/delete"))
    findings = examine(*ROUND_TRIP)
    assert findings["removal"].verdict == "failed"
    (name,) = left_behind(open_server[0])
    assert (
        f"{name} was left behind: cannot delete an experiment: 403" in findings["removal"].message
    )
    assert name in findings["removal"].remedy
    url = f"http://127.0.0.1:{open_server[0]}/api/2.0/mlflow/experiments"
    query = {"experiment_name": name}
    experiment = requests.get(f"{url}/get-by-name", params=query, timeout=30).json()["experiment"]
    key = {"experiment_id": experiment["experiment_id"]}
    requests.post(f"{url}/delete", json=key, timeout=30).raise_for_status()


@pytest.mark.parametrize("moment", ["experiments/create", "mlflow-artifacts", "model-versions/get"])
def test_an_interrupted_round_trip_leaves_nothing(
    moment: str,
    between: Proxy,
    examine: Examine,
    open_server: tuple[int, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Objects of requests whose answer never came are deleted too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    monkeypatch.setattr(roundtrip, "INTERRUPT_WAIT_S", 3.0)  # the server may be slow here
    interrupted = threading.Event()

    def interrupt(number: int, method: str, path: str) -> int | None:
        if moment in path and not interrupted.is_set():
            interrupted.set()
            os.kill(os.getpid(), signal.SIGINT)
        return None

    between.status_for = interrupt
    try:
        with pytest.raises(KeyboardInterrupt):
            examine(*ROUND_TRIP)
    finally:
        signal.signal(signal.SIGINT, before)
    assert interrupted.is_set()
    assert not left_behind(open_server[0])
    assert not [file for file in (open_server[1] / "artifacts").rglob("*") if file.is_file()]


@contextmanager
def silent() -> Iterator[str]:
    """Yield the URL of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_servers_that_never_answer_fail_within_a_bounded_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with silent() as url:
        for name in (
            "MLFLOW_TRACKING_URI",
            "EUROSAT_SERVING_URL",
            "EUROSAT_PROMOTER_URL",
            "STORAGE_EMULATOR_HOST",
        ):
            monkeypatch.setenv(name, url)
        started = time.monotonic()
        assert doctor.main(["--json", f"--timeout-s={TIMEOUT_S}"]) == exit_codes.NEGATIVE
        assert time.monotonic() - started < MAX_TOTAL_S
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    failed = {name for name, check in checks.items() if check["verdict"] == "failed"}
    assert failed == {"tracking server", "promoter", "serving", "bucket"}
    for name in failed - {"bucket"}:
        assert f"has not answered within {TIMEOUT_S} s" in checks[name]["message"]
    assert checks["version"]["message"] == "tracking server failed"
    assert all(checks[name]["remedy"] for name in failed)


def test_for_a_stopped_server_the_remedy_names_an_env_file_that_may_be_stale(
    tmp_path: Path, examine: Examine
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    finding = examine("tracking server", MLFLOW_TRACKING_URI=url)["tracking server"]
    assert finding.verdict == "failed"
    assert "Connection refused" in finding.message
    assert ".platform/env" not in finding.remedy
    (tmp_path / ".platform").mkdir()
    (tmp_path / ".platform" / "env").touch()
    finding = examine("tracking server")["tracking server"]
    assert "remove .platform/env" in finding.remedy
    finding = examine("tracking server", MLFLOW_TRACKING_URI="http://[broken")["tracking server"]
    assert finding.verdict == "failed"


Answers = dict[str, tuple[int, str]]


@contextmanager
def answering(answers: Answers, ahead_s: float = 0.0) -> Iterator[str]:
    """Yield the URL of a server with these answers by path, its clock ahead of ours."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers.get(self.path.partition("?")[0], (404, ""))
            self.send_response_only(status)
            self.send_header("Date", formatdate(time.time() + ahead_s, usegmt=True))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

    with listening(Handler) as url:
        yield url


def test_another_version_of_mlflow_and_another_kind_of_server_fail(examine: Examine) -> None:
    for body, message in (
        ("2.9.1", "2.9.1 on the server"),
        ("<html>", "this is not an MLflow server"),
    ):
        with answering({"/health": (200, "OK"), "/version": (200, body)}) as url:
            finding = examine("version", MLFLOW_TRACKING_URI=url)["version"]
        assert finding.verdict == "failed"
        assert message in finding.message


@pytest.mark.parametrize(
    "first", [b"Content-Length: 100000\r\n\r\n", b"X-Endless: "], ids=["body", "headers"]
)
def test_a_server_that_answers_byte_by_byte_is_given_up(first: bytes) -> None:
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def trickle() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(65_536)
                connection.sendall(b"HTTP/1.1 200 OK\r\n" + first)
                while not over.wait(0.05):
                    connection.sendall(b"x")

        thread = threading.Thread(target=trickle)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        probe = HttpProbe(name="tracking server", url=url, timeout_s=0.5, remedy="")
        with pytest.raises(Failed, match=r"not answered within 0\.5 s"):
            probe.request("GET", "/health")
        over.set()
        thread.join(timeout=10)


@pytest.mark.parametrize(("ahead_s", "verdict"), [(0.0, "ok"), (60.0, "failed"), (-60, "failed")])
def test_a_clock_that_differs_fails(ahead_s: float, verdict: str, examine: Examine) -> None:
    with answering({"/health": (200, "OK")}, ahead_s) as url:
        finding = examine("tracking server", "clock", MLFLOW_TRACKING_URI=url)["clock"]
    assert finding.verdict == verdict
    match = re.search(r"tracking server (\S+) s", finding.message)
    assert match
    assert float(match[1]) == pytest.approx(ahead_s, abs=servers.MAX_CLOCK_SKEW_S - 1)


# The promoter and serving


@pytest.fixture
def promoter(tmp_path: Path) -> Iterator[str]:
    """Run the receiver's app and yield its URL."""
    queue = EventQueue(tmp_path / "queue.db")
    port = free_port()
    app = receiver.Receiver(versions.MODEL, queue, WEBHOOK_SECRET).app()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started, 30, "the promoter listens")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
        queue.close()


@pytest.mark.parametrize(
    ("secret", "verdict", "message"),
    [(WEBHOOK_SECRET, "ok", "accepted an example (200)"), ("another", "failed", "401")],
)
def test_an_example_delivery_of_the_webhook_is_reported(
    secret: str,
    verdict: str,
    message: str,
    closed_server: int,
    promoter: str,
    examine: Examine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hooks = f"http://127.0.0.1:{closed_server}/api/2.0/mlflow/webhooks"
    admin = ("admin", PASSWORD)
    events = [
        dict(zip(("entity", "action"), event.upper().split("."), strict=True))
        for event in worker.EVENTS
        if "tag" not in event
    ]
    created = requests.post(
        hooks,
        auth=admin,
        timeout=30,
        json={
            "name": webhooks.NAME,
            "url": f"{promoter}/webhook",
            "events": events,
            "secret": secret,
        },
    )
    created.raise_for_status()
    try:
        monkeypatch.setenv("EUROSAT_PROMOTER_URL", promoter)
        findings = examine("webhook", "promoter", **as_user("admin", closed_server))
    finally:
        webhook_id = created.json()["webhook"]["webhook_id"]
        requests.delete(f"{hooks}/{webhook_id}", auth=admin, timeout=30).raise_for_status()
    assert findings["credentials"].message == "admin, an administrator"
    assert findings["webhook"].verdict == verdict
    assert message in findings["webhook"].message
    assert findings["promoter"].verdict == "ok"
    assert findings["promoter"].message == f"{promoter}: 0 deliveries wait, 0 were given up"
    findings = examine("webhook")
    assert findings["webhook"].verdict == "n/a"


def test_the_served_version_is_compared_with_the_champion(
    open_server: tuple[int, Path], examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "SWAP_TIMEOUT_S", 0.2)
    monkeypatch.setattr(servers, "POLL_INTERVAL_S", 0.05)
    url = f"http://127.0.0.1:{open_server[0]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    serves: Answers = {"/ready": (200, '{"ready": true, "model_version": "1"}')}
    with answering(serves) as serving:
        monkeypatch.setenv("EUROSAT_SERVING_URL", serving)
        finding = examine("credentials", "serving")["serving"]
        assert finding.message == "version 1 answers; not compared: eurosat has no champion yet"
        assert (finding := examine("serving")["serving"]).verdict == "ok"
        assert "has not accepted our credentials" in finding.message, "that check did not run"
        api = f"{url}/api/2.0/mlflow"
        model: dict[str, object] = {"name": servers.MODEL}
        for path, payload in (
            ("registered-models/create", {}),
            ("model-versions/create", {"source": "gs://none/at-all"}),
            ("model-versions/create", {"source": "gs://none/at-all"}),
            ("registered-models/alias", {"alias": servers.CHAMPION, "version": "1"}),
        ):
            requests.post(f"{api}/{path}", json=model | payload, timeout=30).raise_for_status()
        try:
            finding = examine("credentials", "serving")["serving"]
            assert (finding.verdict, finding.message) == ("ok", "version 1, the champion, answers")
            moved = model | {"alias": servers.CHAMPION, "version": "2"}
            requests.post(f"{api}/registered-models/alias", json=moved, timeout=30)
            finding = examine("credentials", "serving")["serving"]
            assert finding.verdict == "failed"
            assert "answers with version 1, the champion is 2" in finding.message
            serves["/ready"] = (503, "{}")
            finding = examine("credentials", "serving")["serving"]
            assert "serves no version, the champion is 2" in finding.message
            serves["/ready"] = (200, "<html>")
            assert "this is not" in examine("serving")["serving"].message
        finally:
            deleted = requests.delete(f"{api}/registered-models/delete", json=model, timeout=30)
            deleted.raise_for_status()


# The object store


@pytest.fixture(scope="module")
def store() -> Iterator[int]:
    """Run a fake-gcs-server with a bucket mlflow, as `make platform` does; yield its port."""
    with tempfile.TemporaryDirectory() as folder, fake_gcs_server(Path(folder)) as url:
        make_bucket(url, "mlflow")
        yield int(url.rpartition(":")[2])


def objects(port: int) -> list[str]:
    listing = requests.get(f"http://127.0.0.1:{port}/storage/v1/b/mlflow/o", timeout=10).json()
    return [item["name"] for item in listing.get("items", [])]


def test_an_object_is_written_read_and_deleted(store: int, examine: Examine) -> None:
    finding = examine("bucket", STORAGE_EMULATOR_HOST=f"http://127.0.0.1:{store}")["bucket"]
    assert finding.message == "an object in gs://mlflow/artifacts: written, read, deleted"
    assert not objects(store)
    finding = examine("bucket", EUROSAT_ARTIFACTS="gs://another/place")["bucket"]
    assert finding.verdict == "failed"
    assert "there is no such bucket" in finding.message
    finding = examine("bucket", EUROSAT_ARTIFACTS="s3://mlflow")["bucket"]
    assert finding.verdict == "n/a"
    finding = examine("bucket", EUROSAT_ARTIFACTS="", STORAGE_EMULATOR_HOST="127.0.0.1:1")["bucket"]
    assert finding.remedy == "set STORAGE_EMULATOR_HOST=http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("call", "permission"),
    [
        (("POST", "/upload/"), "storage.objects.create"),
        (("GET", "/download/"), "storage.objects.get"),
        (("DELETE", "/b/mlflow/o/"), "storage.objects.delete"),
    ],
)
def test_a_missing_permission_is_named(
    call: tuple[str, str], permission: str, store: int, examine: Examine
) -> None:
    with proxy(store) as before:
        before.status_for = refusing(call)
        finding = examine("bucket", STORAGE_EMULATOR_HOST=before.uri)["bucket"]
    assert finding.verdict == "failed"
    assert f"{permission} is denied on gs://mlflow" in finding.message
    if permission != "storage.objects.delete":
        assert not objects(store)


def test_a_time_limit_of_zero_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.run_command(doctor.main, ["--timeout-s=0"], platform=False)
    assert stopped.value.code == exit_codes.BAD_INPUT
    assert "--timeout-s must be above 0; got 0" in capsys.readouterr().err
