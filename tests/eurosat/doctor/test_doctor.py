"""The doctor tells true, of real servers that are well, ill, foreign, silent or closed to us."""

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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
import uvicorn
from cryptography.fernet import Fernet

from eurosat.data.pack import dataset_fingerprint
from eurosat.data.sources import SyntheticSource, open_source
from eurosat.doctor import __main__ as doctor
from eurosat.doctor import host, roundtrip, servers
from eurosat.doctor.checks import Check, Failed, Finding, NotApplicable, examine
from eurosat.doctor.context import Server, Visit
from eurosat.runtime import cli, exit_codes
from registry import receiver, versions, webhooks, worker
from registry.event_queue import Inbox
from tests.support.mlflow_server import Proxy, free_port, mlflow_server, proxy
from tests.support.object_stores import fake_gcs, make_bucket
from tests.support.paths import ROOT
from tests.support.recipes import TINY
from tests.support.registry import MLFLOW_WARNS
from tests.support.serving import until

pytestmark = MLFLOW_WARNS
NAMES = [check.name for check in doctor.CHECKS]
PASSWORD = "twelve or more"
SECRET = "between the two"
SHORT_S, BOUND_S = 0.5, 60.0
"""A timeout of a request, and of all requests to servers that never answer."""
LOCAL = {"interpreter", "lock", "torch", "cores", "gpu", "tiles", "disk", "secrets"}


@pytest.fixture(autouse=True)
def nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No platform, tiles or secrets but the test's own."""
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
    """With MLflow's basic authentication, its admin, a user ada, and webhooks to loopback."""
    folder = tmp_path_factory.mktemp("closed")
    (folder / "auth.ini").write_text(
        "[mlflow]\ndefault_permission = READ\nadmin_username = admin\n"
        f"database_uri = sqlite:///{folder}/auth.db\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        "auth_cache_ttl_seconds = 600\n"  # a password's hash takes a tenth of a second
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


Examined = Callable[..., dict[str, Finding]]


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> Examined:
    """The findings of the named checks and of those they need."""

    def look(*names: str, visit: Visit | None = None, **variables: str) -> dict[str, Finding]:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        checks = [check for check in doctor.CHECKS if check.name in with_needs(names)]
        with visit or Visit() as visiting:
            return {one.name: one for one in examine(checks, visiting, lambda finding: None)}

    return look


def with_needs(names: tuple[str, ...]) -> set[str]:
    wanted = set(names)
    for check in reversed(doctor.CHECKS):
        if check.name in wanted:
            wanted |= set(check.needs)
    return wanted


def as_user(name: str, port: int, password: str = PASSWORD) -> dict[str, str]:
    return {
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}",
        "MLFLOW_TRACKING_USERNAME": name,
        "MLFLOW_TRACKING_PASSWORD": password,
    }


TRIP = ("run and metric", "artifact", "model version", "removal")


def left_behind(port: int, auth: tuple[str, str] | None = None) -> list[str]:
    """Experiments, runs and registered models of a doctor's that the server still shows."""
    url, found = f"http://127.0.0.1:{port}/api/2.0/mlflow", []
    for path in ("experiments", "registered-models"):
        ask = requests.post if path == "experiments" else requests.get
        sent: Any = {"json" if path == "experiments" else "params": {"max_results": 1000}}
        told = ask(f"{url}/{path}/search", auth=auth, timeout=30, **sent)
        told.raise_for_status()
        for ones in told.json().values():
            found += [one["name"] for one in ones if one["name"].startswith(roundtrip.PREFIX)]
    return found


# The runner


def test_a_check_that_breaks_fails_alone_and_each_is_told_when_it_is_done() -> None:
    def broken(visit: Visit) -> str:
        raise ZeroDivisionError("of http://me:secret@server")

    def refuses(visit: Visit) -> str:
        raise Failed("it is ill", "a remedy")

    def nothing(visit: Visit) -> str:
        raise NotApplicable("nothing here")

    told: list[Finding] = []
    checks = (
        Check("broken", broken),
        Check("after it", lambda visit: f"{len(told)} told"),
        Check("ill", refuses),
        Check("needs it", lambda visit: "never", needs=("ill",)),
        Check("not here", nothing),
        Check("needs that", lambda visit: "no", needs=("not here",)),
    )
    found = examine(checks, Visit(), told.append)
    assert told == found
    assert [(one.verdict, one.said) for one in found] == [
        ("failed", "ZeroDivisionError: of http://me:***@server"),
        ("ok", "1 told"),
        ("failed", "it is ill"),
        ("n/a", "ill failed"),
        ("n/a", "nothing here"),
        ("n/a", "nothing here"),
    ]
    assert [bool(one.remedy) for one in found] == [one.verdict == "failed" for one in found]


def test_a_check_that_takes_long_is_told_of(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("eurosat.doctor.checks.FIRST_S", 0.05)

    def slow(visit: Visit) -> str:
        time.sleep(0.3)
        return "done"

    examine((Check("slow", slow),), Visit(), lambda finding: None)
    assert "... slow: 0 s so far" in capfd.readouterr().err


def test_every_check_is_in_the_docs_and_no_other() -> None:
    lines = (ROOT / "docs" / "doctor.md").read_text().splitlines()
    rows = [line.split("|")[1].strip(" `") for line in lines if line.startswith("| `")]
    assert rows == NAMES


# This machine


def test_without_a_platform_nothing_fails_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main([]) == exit_codes.OK
    lines = capsys.readouterr().out.splitlines()
    told = {line[8:].split("  ")[0].strip(): line.split()[0] for line in lines[:-1]}
    assert list(told) == NAMES
    assert {name for name, verdict in told.items() if verdict == "ok"} <= LOCAL
    assert not list(tmp_path.iterdir()), "no store was made by looking for one"
    assert doctor.main(["--json"]) == exit_codes.OK
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is True
    assert {one["name"]: one["verdict"] for one in answer["checks"]} == told


def test_the_lock_names_the_package_that_differs(tmp_path: Path, examined: Examined) -> None:
    lock = tmp_path / "requirements.lock"
    hashed = " \\\n    --hash=sha256:00\n    # via nobody\n"
    lock.write_text(
        f"numpy==1.0.0{hashed}absent-package==2{hashed}"
        f'winonly==1 ; sys_platform == "win32"{hashed}pytest=={pytest.__version__}{hashed}'
    )
    found = examined("lock", visit=Visit(lock=lock))["lock"]
    assert found.verdict == "failed"
    assert "2 of 3 packages differ" in found.said
    assert "not 1.0.0" in found.said
    assert "absent-package missing, not 2" in found.said
    found = examined("lock", visit=Visit(lock=tmp_path / "none"))["lock"]
    assert found.verdict == "n/a"


def test_more_threads_than_cores_are_a_fault(tmp_path: Path, examined: Examined) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4096)
        found = examined("cores")["cores"]
    finally:
        torch.set_num_threads(before)
    assert found.verdict == "failed"
    assert "OMP_NUM_THREADS=" in found.remedy
    assert host.cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert host.cpu_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert host.cpu_quota(tmp_path) is None


def test_a_full_disk_is_a_fault_by_the_limit_that_is_given(examined: Examined) -> None:
    assert examined("disk", visit=Visit(free_gb=0))["disk"].verdict == "ok"
    found = examined("disk", visit=Visit(free_gb=1e9))["disk"]
    assert found.verdict == "failed"
    assert "1e+09 are wanted" in found.said


def test_secrets_that_others_can_read_are_a_fault_that_the_remedy_ends(
    tmp_path: Path, examined: Examined
) -> None:
    folder = tmp_path / "the secrets"
    folder.mkdir(mode=0o755)
    (folder / "key").write_text("s")
    (folder / "key").chmod(0o644)
    told = examined("secrets", EUROSAT_SECRETS=str(folder))["secrets"]
    assert told.verdict == "failed"
    assert f"{folder / 'key'} has mode 644" in told.said
    subprocess.run(shlex.split(told.remedy), check=True)
    assert examined("secrets")["secrets"].verdict == "ok"
    (folder / "key").chmod(0o644)
    folder.chmod(0o700)
    assert examined("secrets")["secrets"].verdict == "ok", "nobody else enters the folder"
    env = tmp_path / ".platform" / "env"
    env.parent.mkdir()
    env.write_text("A=b\n")
    env.chmod(0o640)
    told = examined("secrets")["secrets"]
    assert told.verdict == "failed"
    assert ".platform/env has mode 640" in told.said
    env.chmod(0o600)
    assert examined("secrets")["secrets"].said == "2 files, their owner's alone"
    assert examined("secrets", EUROSAT_SECRETS="none")["secrets"].verdict == "failed"


def write_tiles(folder: Path) -> None:
    from eurosat.config import compose

    source = open_source(compose(TINY).data)
    assert isinstance(source, SyntheticSource)
    for path in source.paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(source.read(path))


def test_tiles_are_held_to_what_eurosat_is(
    tmp_path: Path, examined: Examined, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = examined("tiles", EUROSAT_ROOT=str(tmp_path / "none"))["tiles"]
    assert found.verdict == "failed"
    assert "no EuroSAT tiles under" in found.said
    folder = tmp_path / "EuroSAT_RGB"
    write_tiles(folder)
    found = examined("tiles", EUROSAT_ROOT=str(tmp_path))["tiles"]
    assert found.verdict == "failed"
    assert "AnnualCrop 20, not 3000" in found.said
    monkeypatch.setattr(host, "EUROSAT_CLASSES", dict.fromkeys(host.EUROSAT_CLASSES, 20))
    assert "some tiles were changed" in examined("tiles")["tiles"].said
    files = sorted(folder.rglob("*.jpg"))
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    paths = [str(file.relative_to(folder)) for file in files]
    monkeypatch.setattr(host, "EUROSAT_RGB", dataset_fingerprint(paths, digests))
    assert examined("tiles")["tiles"].verdict == "ok"


@pytest.mark.real_data
def test_the_genuine_tiles_are_known(eurosat_root: Path, examined: Examined) -> None:
    found = examined("tiles", EUROSAT_ROOT=str(eurosat_root))["tiles"]
    assert found.verdict == "ok"
    assert "27,000 tiles of 10 classes" in found.said


def test_what_is_known_elsewhere_too_is_the_same_there() -> None:
    reference = json.loads((ROOT / "expectations" / "reference" / "eurosat.json").read_text())
    assert reference["classes"] == host.EUROSAT_CLASSES
    assert host.EUROSAT_RGB in (ROOT / "tests" / "eurosat" / "data" / "test_pack.py").read_text()
    assert (servers.MODEL, servers.CHAMPION) == (versions.MODEL, versions.CHAMPION)
    assert servers.WEBHOOK == webhooks.NAME
    python = ".".join(map(str, host.PYTHON))
    assert f'requires-python = ">={python},' in (ROOT / "pyproject.toml").read_text()


# The tracking server


def test_a_server_without_accounts_is_written_to_read_and_left_as_it_was(
    open_server: tuple[int, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port, folder = open_server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}/")
    assert doctor.main(["--json"]) == exit_codes.OK
    told = {one["name"]: one for one in json.loads(capsys.readouterr().out)["checks"]}
    for name in ("tracking server", "version", "credentials", *TRIP, "clock"):
        assert told[name]["verdict"] == "ok", told[name]
    assert told["credentials"]["said"] == "the server asks for none"
    assert told["webhook"]["verdict"] == "n/a"
    assert not left_behind(port)
    assert not [file for file in (folder / "artifacts").rglob("*") if file.is_file()]


def test_a_user_makes_the_round_trip_and_is_shown_no_webhooks(
    closed_server: int, examined: Examined
) -> None:
    found = examined(*TRIP, "webhook", **as_user("ada", closed_server))
    assert {found[name].verdict for name in TRIP} == {"ok"}, found
    assert found["credentials"].said == "ada"
    assert found["webhook"].verdict == "n/a"
    assert not left_behind(closed_server, ("admin", PASSWORD))


@pytest.mark.parametrize(("name", "given"), [("ada", "refused"), ("", "asked for, and none are")])
def test_credentials_that_are_wrong_or_missing_fail_once(
    name: str, given: str, closed_server: int, examined: Examined
) -> None:
    variables = as_user(name, closed_server, "wrong but long enough" if name else "")
    found = examined(*TRIP, "webhook", "clock", **variables)
    assert found["credentials"].verdict == "failed"
    assert f"credentials are {given}" in found["credentials"].said
    assert "MLFLOW_TRACKING_PASSWORD" in found["credentials"].remedy
    assert {found[one].verdict for one in (*TRIP, "webhook")} == {"n/a"}
    assert found["clock"].verdict == "ok"


def refusing(*calls: tuple[str, str], status: int = 403) -> Callable[[int, str, str], int | None]:
    def refuse(number: int, method: str, path: str) -> int | None:
        refused = any(method == wanted and part in path for wanted, part in calls)
        return status if refused else None

    return refuse


@pytest.fixture
def between(open_server: tuple[int, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the server without accounts, and the tracking server of the test."""
    with proxy(open_server[0]) as made:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", made.uri)
        yield made


def test_an_account_that_may_only_read_has_nothing_to_mend(
    between: Proxy, examined: Examined
) -> None:
    between.status = refusing(("POST", "experiments/create"))
    found = examined(*TRIP)
    assert {found[name].verdict for name in TRIP[:3]} == {"n/a"}
    assert found["removal"].verdict == "ok"
    assert "may read and not write" in found["run and metric"].said


def test_no_model_is_made_where_it_could_not_be_deleted(
    between: Proxy, examined: Examined, open_server: tuple[int, Path]
) -> None:
    """The platform's writers: a gate before MLflow keeps deleting for promoters."""
    between.status = refusing(("DELETE", "registered-models/delete"))
    found = examined(*TRIP)
    assert found["model version"].verdict == "n/a"
    assert "could not be deleted" in found["model version"].said
    assert found["removal"].verdict == "ok"
    assert not left_behind(open_server[0])


@pytest.mark.parametrize(
    ("call", "name", "said"),
    [
        (("POST", "runs/log-metric"), "run and metric", "cannot log a metric: 500"),
        (("PUT", "mlflow-artifacts"), "artifact", "cannot store an artifact: 500"),
        (("GET", "mlflow-artifacts"), "artifact", "cannot download an artifact: 500"),
        (("POST", "model-versions/create"), "model version", "cannot create a model version: 500"),
    ],
)
def test_what_fails_on_the_way_is_named_and_cleaned_up(
    call: tuple[str, str],
    name: str,
    said: str,
    between: Proxy,
    examined: Examined,
    open_server: tuple[int, Path],
) -> None:
    between.status = refusing(call, status=500)
    between.forwards_first = True  # and so is made after all
    found = examined(*TRIP)
    assert found[name].verdict == "failed"
    assert said in found[name].said
    assert found["removal"].verdict == "ok"
    assert not left_behind(open_server[0])
    assert not [one for one in (open_server[1] / "artifacts").rglob("*") if one.is_file()]


def test_an_artifact_that_comes_back_changed_is_found(between: Proxy, examined: Examined) -> None:
    between.broken = lambda path, body: body[:-1] if "mlflow-artifacts" in path else body
    found = examined(*TRIP)
    assert found["artifact"].verdict == "failed"
    assert "came back as 2,097,151 of" in found["artifact"].said
    assert found["model version"].verdict == "ok"


def test_what_cannot_be_deleted_is_named(
    between: Proxy, examined: Examined, open_server: tuple[int, Path]
) -> None:
    between.status = refusing(("POST", "experiments/delete"))
    found = examined(*TRIP)
    assert found["removal"].verdict == "failed"
    (name,) = left_behind(open_server[0])
    assert f"{name} was left behind: cannot delete an experiment: 403" in found["removal"].said
    assert name in found["removal"].remedy
    url = f"http://127.0.0.1:{open_server[0]}/api/2.0/mlflow/experiments"
    named = {"experiment_name": name}
    told = requests.get(f"{url}/get-by-name", params=named, timeout=30).json()["experiment"]
    given = {"experiment_id": told["experiment_id"]}
    requests.post(f"{url}/delete", json=given, timeout=30).raise_for_status()


@pytest.mark.parametrize("moment", ["experiments/create", "mlflow-artifacts", "model-versions/get"])
def test_an_interrupted_trip_leaves_nothing(
    moment: str,
    between: Proxy,
    examined: Examined,
    open_server: tuple[int, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also what was made by a request whose answer never came."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    monkeypatch.setattr(roundtrip, "ARRIVED_S", 3.0)  # the server may be slow here
    interrupted = threading.Event()

    def interrupt(number: int, method: str, path: str) -> int | None:
        if moment in path and not interrupted.is_set():
            interrupted.set()
            os.kill(os.getpid(), signal.SIGINT)
        return None

    between.status = interrupt
    try:
        with pytest.raises(KeyboardInterrupt):
            examined(*TRIP)
    finally:
        signal.signal(signal.SIGINT, before)
    assert interrupted.is_set()
    assert not left_behind(open_server[0])
    assert not [one for one in (open_server[1] / "artifacts").rglob("*") if one.is_file()]


@contextmanager
def silent() -> Iterator[str]:
    """A server that takes connections and never answers; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_servers_that_never_answer_are_told_within_bounds(
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
        assert doctor.main(["--json", f"--timeout-s={SHORT_S}"]) == exit_codes.NEGATIVE
        assert time.monotonic() - started < BOUND_S
    told = {one["name"]: one for one in json.loads(capsys.readouterr().out)["checks"]}
    failed = {name for name, one in told.items() if one["verdict"] == "failed"}
    assert failed == {"tracking server", "promoter", "serving", "bucket"}
    for name in failed - {"bucket"}:
        assert f"has not answered within {SHORT_S} s" in told[name]["said"]
    assert told["version"]["said"] == "tracking server failed"
    assert all(told[name]["remedy"] for name in failed)


def test_nobody_at_home_is_told_with_the_file_that_may_have_outlived_its_platform(
    tmp_path: Path, examined: Examined
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    found = examined("tracking server", MLFLOW_TRACKING_URI=url)["tracking server"]
    assert found.verdict == "failed"
    assert "Connection refused" in found.said
    assert ".platform/env" not in found.remedy
    (tmp_path / ".platform").mkdir()
    (tmp_path / ".platform" / "env").touch()
    found = examined("tracking server")["tracking server"]
    assert "remove .platform/env" in found.remedy
    found = examined("tracking server", MLFLOW_TRACKING_URI="http://[broken")["tracking server"]
    assert found.verdict == "failed"


Answers = dict[str, tuple[int, str]]


@contextmanager
def answering(answers: Answers, ahead_s: float = 0.0) -> Iterator[str]:
    """A server with these answers by path, whose clock is ahead of ours; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers.get(self.path.partition("?")[0], (404, ""))
            self.send_response_only(status)
            self.send_header("Date", formatdate(time.time() + ahead_s, usegmt=True))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            """Tests have their own."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_server_of_another_version_or_of_another_kind_is_found(examined: Examined) -> None:
    for body, said in (("2.9.1", "2.9.1 on the server"), ("<html>", "that is no MLflow server")):
        with answering({"/health": (200, "OK"), "/version": (200, body)}) as url:
            found = examined("version", MLFLOW_TRACKING_URI=url)["version"]
        assert found.verdict == "failed"
        assert said in found.said


@pytest.mark.parametrize(
    "first", [b"Content-Length: 100000\r\n\r\n", b"X-Endless: "], ids=["body", "headers"]
)
def test_a_server_that_answers_byte_by_byte_holds_nobody_up(first: bytes) -> None:
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
        asked = Server(name="tracking server", url=url, timeout_s=0.5, remedy="")
        with pytest.raises(Failed, match=r"not answered within 0\.5 s"):
            asked.ask("GET", "/health")
        over.set()
        thread.join(timeout=10)


@pytest.mark.parametrize(("ahead_s", "verdict"), [(0.0, "ok"), (60.0, "failed"), (-60, "failed")])
def test_a_clock_that_differs_is_found(ahead_s: float, verdict: str, examined: Examined) -> None:
    with answering({"/health": (200, "OK")}, ahead_s) as url:
        found = examined("tracking server", "clock", MLFLOW_TRACKING_URI=url)["clock"]
    assert found.verdict == verdict
    told = re.search(r"tracking server (\S+) s", found.said)
    assert told
    assert float(told[1]) == pytest.approx(ahead_s, abs=servers.SKEW_S - 1)


# The promoter and serving


@pytest.fixture
def promoter(tmp_path: Path) -> Iterator[str]:
    """The receiver's own app; its URL."""
    inbox = Inbox(tmp_path / "inbox.db")
    port = free_port()
    app = receiver.Receiver(versions.MODEL, inbox, SECRET).app()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started, 30, "the promoter listens")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
        inbox.close()


@pytest.mark.parametrize(
    ("secret", "verdict", "told"),
    [(SECRET, "ok", "took an example (200)"), ("another", "failed", "401")],
)
def test_the_webhook_is_delivered_and_its_answer_told(
    secret: str,
    verdict: str,
    told: str,
    closed_server: int,
    promoter: str,
    examined: Examined,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hooks = f"http://127.0.0.1:{closed_server}/api/2.0/mlflow/webhooks"
    admin = ("admin", PASSWORD)
    events = [
        dict(zip(("entity", "action"), one.upper().split("."), strict=True))
        for one in worker.EVENTS
        if "tag" not in one
    ]
    made = requests.post(
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
    made.raise_for_status()
    try:
        monkeypatch.setenv("EUROSAT_PROMOTER_URL", promoter)
        found = examined("webhook", "promoter", **as_user("admin", closed_server))
    finally:
        one = made.json()["webhook"]["webhook_id"]
        requests.delete(f"{hooks}/{one}", auth=admin, timeout=30).raise_for_status()
    assert found["credentials"].said == "admin, an administrator"
    assert found["webhook"].verdict == verdict
    assert told in found["webhook"].said
    assert found["promoter"].verdict == "ok"
    assert found["promoter"].said == f"{promoter}: 0 deliveries wait, 0 were given up"
    found = examined("webhook")
    assert found["webhook"].verdict == "n/a"


def test_serving_is_held_to_the_champion(
    open_server: tuple[int, Path], examined: Examined, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "SWAP_S", 0.2)
    monkeypatch.setattr(servers, "LOOK_S", 0.05)
    url = f"http://127.0.0.1:{open_server[0]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    serves: Answers = {"/ready": (200, '{"ready": true, "model_version": "1"}')}
    with answering(serves) as serving:
        monkeypatch.setenv("EUROSAT_SERVING_URL", serving)
        found = examined("credentials", "serving")["serving"]
        assert found.said == "version 1 answers; not compared: eurosat has no champion yet"
        assert (found := examined("serving")["serving"]).verdict == "ok"
        assert "does not answer us" in found.said, "nobody asked for its credentials"
        call = f"{url}/api/2.0/mlflow"
        named: dict[str, object] = {"name": servers.MODEL}
        for path, sent in (
            ("registered-models/create", {}),
            ("model-versions/create", {"source": "gs://none/at-all"}),
            ("model-versions/create", {"source": "gs://none/at-all"}),
            ("registered-models/alias", {"alias": servers.CHAMPION, "version": "1"}),
        ):
            requests.post(f"{call}/{path}", json=named | sent, timeout=30).raise_for_status()
        try:
            found = examined("credentials", "serving")["serving"]
            assert (found.verdict, found.said) == ("ok", "version 1, the champion, answers")
            moved = named | {"alias": servers.CHAMPION, "version": "2"}
            requests.post(f"{call}/registered-models/alias", json=moved, timeout=30)
            found = examined("credentials", "serving")["serving"]
            assert found.verdict == "failed"
            assert "answers with version 1, the champion is 2" in found.said
            serves["/ready"] = (503, "{}")
            found = examined("credentials", "serving")["serving"]
            assert "serves no version, the champion is 2" in found.said
            serves["/ready"] = (200, "<html>")
            assert "that is no" in examined("serving")["serving"].said
        finally:
            gone = requests.delete(f"{call}/registered-models/delete", json=named, timeout=30)
            gone.raise_for_status()


# The object store


@pytest.fixture(scope="module")
def store() -> Iterator[int]:
    """A fake-gcs-server with a bucket mlflow, as `make platform` starts it; its port."""
    with tempfile.TemporaryDirectory() as folder, fake_gcs(Path(folder)) as url:
        make_bucket(url, "mlflow")
        yield int(url.rpartition(":")[2])


def objects(port: int) -> list[str]:
    told = requests.get(f"http://127.0.0.1:{port}/storage/v1/b/mlflow/o", timeout=10).json()
    return [one["name"] for one in told.get("items", [])]


def test_an_object_is_written_read_and_deleted(store: int, examined: Examined) -> None:
    found = examined("bucket", STORAGE_EMULATOR_HOST=f"http://127.0.0.1:{store}")["bucket"]
    assert found.said == "an object in gs://mlflow/artifacts: written, read, deleted"
    assert not objects(store)
    found = examined("bucket", EUROSAT_ARTIFACTS="gs://another/place")["bucket"]
    assert found.verdict == "failed"
    assert "there is no such bucket" in found.said
    found = examined("bucket", EUROSAT_ARTIFACTS="s3://mlflow")["bucket"]
    assert found.verdict == "n/a"
    found = examined("bucket", EUROSAT_ARTIFACTS="", STORAGE_EMULATOR_HOST="127.0.0.1:1")["bucket"]
    assert found.remedy == "say http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("call", "permission"),
    [
        (("POST", "/upload/"), "storage.objects.create"),
        (("GET", "/download/"), "storage.objects.get"),
        (("DELETE", "/b/mlflow/o/"), "storage.objects.delete"),
    ],
)
def test_a_permission_that_is_missing_is_named(
    call: tuple[str, str], permission: str, store: int, examined: Examined
) -> None:
    with proxy(store) as before:
        before.status = refusing(call)
        found = examined("bucket", STORAGE_EMULATOR_HOST=before.uri)["bucket"]
    assert found.verdict == "failed"
    assert f"{permission} is denied on gs://mlflow" in found.said
    if permission != "storage.objects.delete":
        assert not objects(store)


def test_the_limits_of_a_call_are_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.run_command(doctor.main, ["--timeout-s=0"], platform=False)
    assert stopped.value.code == exit_codes.BAD_INPUT
    assert "--timeout-s must be above 0; got 0" in capsys.readouterr().err
