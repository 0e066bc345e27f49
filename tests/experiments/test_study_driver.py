"""The driver of a study: limits, pruning, retries of lost trials, progress."""

import socket
import time
from functools import partial
from pathlib import Path

import pytest

from eurosat import tracking
from experiments import ownership, studies
from experiments.objective import TrialResult
from experiments.study_driver import StudyDriver
from experiments.sweep_progress import SweepProgress
from tests.support.sweeps import make_study, wait_until


@pytest.mark.usefixtures("tracking_store")
def test_a_trial_fails_after_two_retries(tmp_path: Path) -> None:
    job, study = make_study(tmp_path, trials=1)
    driver = StudyDriver(job, study)
    for retry in range(3):
        spec = driver.next_trial()
        assert spec
        assert (spec.number, spec.retries) == (0, retry)
        driver.worker_died(0, "its worker was killed")
    assert driver.next_trial() is None
    assert study.trials[0].state.name == "FAIL"


@pytest.mark.usefixtures("tracking_store")
def test_resuming_the_trial_of_a_driver_that_was_stopped_is_no_retry(tmp_path: Path) -> None:
    job, study = make_study(tmp_path, trials=1)
    for _ in range(4):
        driver = StudyDriver(job, study)
        spec = driver.next_trial()
        assert spec
        assert (spec.number, spec.retries) == (0, 0)
        assert StudyDriver(job, study).next_trial() is None, "its driver is alive"
        driver.release()
    driver = StudyDriver(job, study)
    assert driver.next_trial()
    driver.worker_died(0, "its worker was killed")
    assert StudyDriver(job, study).next_trial() is None, "it waits for its own driver"
    retried = driver.next_trial()
    assert retried
    assert retried.retries == 1


@pytest.mark.usefixtures("tracking_store")
def test_minutes_limit_the_time_of_all_drivers_together(tmp_path: Path) -> None:
    job, study = make_study(tmp_path, trials=5, minutes=1)
    driver = StudyDriver(job, study)
    assert driver.stop_reason() is None
    assert driver.next_trial()
    assert driver.report_epoch(0, 0, {"val_accuracy": 0.5}) is None
    driver._started -= 61
    reason = driver.report_epoch(0, 1, {"val_accuracy": 0.5})
    assert reason == "stopped: the limit of 1 minutes is reached"
    with ownership.owning(study):
        study.set_user_attr(ownership.SPENT_ATTR, 59.0)
    assert study.user_attrs[ownership.SPENT_ATTR] < 59, "the owner records its time at the end"
    study.set_user_attr(ownership.SPENT_ATTR, 61.0)
    driver = StudyDriver(job, study)
    assert driver.stop_reason() == "the limit of 1 minutes is reached"
    assert driver.next_trial() is None


@pytest.mark.usefixtures("tracking_store")
@pytest.mark.parametrize(("epochs", "rung"), [(3, 1), (5, 2)])
def test_successive_halving_counts_whole_epochs(tmp_path: Path, epochs: int, rung: int) -> None:
    job, study = make_study(tmp_path, trials=2, trial_epochs=epochs, pruner="asha")
    driver = StudyDriver(job, study)
    assert driver.next_trial()
    assert driver.next_trial()
    for epoch in range(rung):
        assert driver.report_epoch(0, epoch, {"val_accuracy": 0.6}) is None
        reason = driver.report_epoch(1, epoch, {"val_accuracy": 0.5})
        assert reason == ("pruned" if epoch + 1 == rung else None)


def test_a_trial_without_heartbeats_is_retried_whatever_clock_it_was_started_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studies, "HEARTBEAT_TIMEOUT_S", 2)
    true_time = time.time
    monkeypatch.setattr(time, "time", lambda: true_time() - 3600)
    job, study = make_study(tmp_path, trials=1)
    with studies.without_heartbeat_warnings():
        study.ask()  # and its driver dies at once
    driver = StudyDriver(job, study)
    assert driver.next_trial() is None, "its driver may be alive"
    wait_until(driver.next_trial, None)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "RUNNING"]


@pytest.mark.usefixtures("tracking_store")
def test_a_trial_that_workers_and_drivers_lose_fails_after_two_retries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On machines that share only the storage; each driver stops sending heartbeats."""
    monkeypatch.setattr(studies, "HEARTBEAT_TIMEOUT_S", 1)
    job, study = make_study(tmp_path, trials=1)
    retries: list[int] = []

    def starts_or_all_ended(driver: StudyDriver) -> bool:
        if spec := driver.next_trial():
            with tracking.run("e", "r", system_metrics=False) as run:
                driver.trial_started(spec.number, run.journal)
            retries.append(spec.retries)
        return bool(spec) or all(trial.state.is_finished() for trial in study.trials)

    for number in range(3):
        monkeypatch.setattr(socket, "gethostname", lambda number=number: f"machine {number}")
        driver = StudyDriver(job, study)
        wait_until(partial(starts_or_all_ended, driver), None)
        if number == 0:
            driver.worker_died(0, "its worker was killed")
            assert starts_or_all_ended(driver)
    assert retries == [0, 1, 2]
    assert "failed: its drivers were lost 3 times" in caplog.text
    assert {trial.state.name for trial in study.trials} == {"FAIL"}


def test_the_progress_shows_trials_the_best_and_the_time_left(tmp_path: Path) -> None:
    job, study = make_study(tmp_path, trials=4, minutes=10, pruner="asha")
    study.set_user_attr(ownership.SPENT_ATTR, 240.0)
    progress = SweepProgress(study, job)
    driver = StudyDriver(job, study)
    with progress.display():
        assert progress.summary() == "0 of 4 done, 0 running, about 6 min left"
        specs = [driver.next_trial() for _ in range(3)]
        progress.record_accuracy(0, 0.5)
        assert progress.summary() == "0 of 4 done, 3 running, so far 0.5000, about 6 min left"
        assert all(specs)
        driver.trial_ended(0, TrialResult(state="complete", values=(0.75,)))
        driver.trial_ended(1, TrialResult(state="pruned"))
        driver.trial_ended(2, TrialResult(state="fail"))
        start = "3 of 4 done (1 pruned, 1 fail), 0 running, best 0.7500, about "
        assert progress.summary().startswith(start)
