"""Which driver concludes a study, and which drivers are alive."""

import json
import multiprocessing
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import psutil
import pytest

from experiments import ownership
from tests.support.sweeps import make_study, wait_until


def own_study_elsewhere(storage: str, skew_s: float) -> None:
    """Own the study as if on another machine, whose clock is off by ``skew_s``."""
    true_time = time.time
    time.time = lambda: true_time() + skew_s
    socket.gethostname = lambda: "elsewhere"
    ownership.HEARTBEAT_INTERVAL_S = 1
    with ownership.owning(optuna.load_study(study_name="s", storage=storage)):
        time.sleep(600)


@pytest.mark.parametrize("skew_s", [-3600.0, 3600.0])
def test_an_owner_elsewhere_is_alive_by_its_heartbeats_whatever_its_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew_s: float
) -> None:
    monkeypatch.setattr(ownership, "HEARTBEAT_TIMEOUT_S", 3)
    monkeypatch.setattr(ownership, "POLL_INTERVAL_S", 0.1)
    job, study = make_study(tmp_path)
    assert not ownership.is_owned(study)
    context = multiprocessing.get_context("spawn")
    owner = context.Process(target=own_study_elsewhere, args=(job.sweep.storage, skew_s))
    owner.start()
    try:
        wait_until(lambda: ownership.OWNER_ATTR in study.user_attrs, None)
        assert ownership.is_owned(study), "the owner is alive"
    finally:
        owner.kill()
        owner.join()
    assert not ownership.is_owned(study), "the owner has died"
    with ownership.owning(study):
        assert ownership.is_owned(study)
    assert not ownership.is_owned(study), "the owner gave it up, although its process is alive"


def test_one_of_several_drivers_that_claim_a_study_at_once_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, study = make_study(tmp_path)
    both_have_looked, is_owned = threading.Barrier(2), ownership.is_owned

    def is_owned_at_once(study: optuna.Study) -> bool:
        owned = is_owned(study)
        both_have_looked.wait(30)
        return owned

    monkeypatch.setattr(ownership, "is_owned", is_owned_at_once)
    monkeypatch.setattr(
        ownership,
        "process_identity",
        lambda: json.dumps([threading.current_thread().name, 1, 0]),
    )

    def claim(_: int) -> bool:
        return ownership.claim(optuna.load_study(study_name="s", storage=job.sweep.storage))

    with ThreadPoolExecutor(2) as machines:
        claims = list(machines.map(claim, range(2)))
    assert sorted(claims) == [False, True]
    monkeypatch.setattr(ownership, "is_owned", is_owned)
    monkeypatch.setattr(ownership, "HEARTBEAT_TIMEOUT_S", 3)
    assert ownership.claim(study), "neither sends heartbeats: the study can be claimed again"


def test_a_zombie_process_counts_as_exited() -> None:
    assert not ownership.has_exited(ownership.process_identity())
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start_time = psutil.Process(process.pid).create_time()
    identity = json.dumps([socket.gethostname(), process.pid, start_time])
    assert not ownership.has_exited(identity)
    process.kill()
    wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE, None)
    assert ownership.has_exited(identity)
    process.communicate()
    assert ownership.has_exited(identity)
    elsewhere = json.dumps(["elsewhere", process.pid, 0])
    assert not ownership.has_exited(elsewhere), "another machine is judged by heartbeats alone"
