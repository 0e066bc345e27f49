"""One driver of a study: choose the next trial, prune, stop, and retry what a dead driver left."""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from eurosat import tracking
from experiments import space as spaces
from experiments import studies
from experiments.objective import SweepJob, TrialResult, TrialSpec
from experiments.ownership import (
    HEARTBEAT_INTERVAL_S,
    SPENT_ATTR,
    has_exited,
    periodic,
    process_identity,
)
from experiments.studies import DRIVER_ATTR, MAX_RETRIES, RELEASED, RETRIES_ATTR, RUN_ATTR

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)


class StudyDriver:
    """Suggests trials, takes their reports, prunes them and records their results.

    A process has one; several processes may work on one study, on machines that share its storage.
    """

    def __init__(self, job: SweepJob, study: "optuna.Study", threads: int = 0) -> None:
        self.job, self._study, self._threads = job, study, threads
        self._space = spaces.load(job.sweep.space)
        self._started, self._spent_s = time.monotonic(), float(study.user_attrs.get(SPENT_ATTR, 0))
        self._running: dict[int, optuna.Trial] = {}
        self._retry_queue: list[optuna.Trial] = []
        self._adopt_orphans()

    def next_trial(self) -> TrialSpec | None:
        """Return the trial to run now, or None if there is none to start."""
        while self._retry_queue and _has_ended(self._retry_queue[0]):
            self._retry_queue.pop(0)  # another driver took it over
        if self._retry_queue:
            trial = self._retry_queue.pop(0)
        elif self.stop_reason() or self._max_trials() <= len(studies.own_trials(self._study)):
            return None
        else:
            with studies.without_heartbeat_warnings():
                trial = self._study.ask()
            lost_run = trial.user_attrs.get(RUN_ATTR)
            was_released = trial.user_attrs.get(DRIVER_ATTR) == RELEASED
            trial.set_user_attr(DRIVER_ATTR, process_identity())
            if lost_run:  # optuna queued it again after its driver's heartbeat timed out
                tracking.fail(lost_run, "it was taken up again on another machine")
                retries = trial.user_attrs.get(RETRIES_ATTR, 0) + (not was_released)
                trial.set_user_attr(RETRIES_ATTR, retries)
                if retries > MAX_RETRIES:
                    self._fail(trial, "its drivers were lost", retries)
                    return self.next_trial()
        self._running[trial.number] = trial
        studies.send_heartbeat(trial)
        return TrialSpec(
            number=trial.number,
            params=spaces.suggest(trial, self._space),
            retries=trial.user_attrs.get(RETRIES_ATTR, 0),
            threads=self._threads,
        )

    def stop_reason(self) -> str | None:
        """Return why no more trials start (``minutes`` or ``target``), or None if they may."""
        spent_s = self._spent_s + time.monotonic() - self._started
        return studies.stop_reason(self._study, self.job, spent_s)

    def trial_started(self, number: int, journal: str) -> None:
        """Record the journal of the trial's run."""
        if not _has_ended(self._running[number]):
            self._running[number].set_user_attr(RUN_ATTR, journal)

    def report_epoch(self, number: int, epoch: int, metrics: Mapping[str, float]) -> str | None:
        """Record an epoch (from 0); return why the trial must stop, or None."""
        trial = self._running[number]
        if _has_ended(trial):
            return "taken over by another driver"
        if len(self.job.sweep.objective_names) == 1:
            epochs_done = epoch + 1
            if epochs_done not in studies.stored_trial(trial).intermediate_values:
                trial.report(metrics["val_accuracy"], epochs_done)
            if trial.should_prune():
                return "pruned"
        reason = self.stop_reason()
        return f"stopped: {reason}" if reason else None

    def trial_ended(self, number: int, result: TrialResult) -> None:
        """Record the result in the study, unless another driver has taken the trial over."""
        from optuna.trial import TrialState

        trial = self._running.pop(number)
        if _has_ended(trial):
            log.warning("trial %d: its result is dropped: another driver took it over", number)
            return
        if result.run_id:
            trial.set_user_attr("run_id", result.run_id)
        if result.state == "complete":
            self._study.tell(trial, list(result.values))
        else:
            self._study.tell(trial, state=TrialState[result.state.upper()])

    def worker_died(self, number: int, reason: str) -> None:
        """Queue the dead worker's trial again, at most MAX_RETRIES times."""
        trial = self._running.pop(number)
        if not _has_ended(trial):
            self._retry(trial, reason)

    def release(self) -> None:
        """Mark the unfinished trials as free, so that resuming them does not count as a retry."""
        from optuna.exceptions import StorageInternalError

        for trial in self._unfinished():
            with contextlib.suppress(StorageInternalError):  # then it counts as a retry
                if not _has_ended(trial):
                    trial.set_user_attr(DRIVER_ATTR, RELEASED)

    def others_are_running(self) -> bool:
        """Return whether trials of other drivers are unfinished and may come back to this one."""
        return not self.stop_reason() and studies.has_unfinished_trials(self._study, self.job)

    @contextlib.contextmanager
    def heartbeats(self) -> Iterator[None]:
        """Show drivers on other machines that the trials here are alive, until the block ends."""
        with periodic(HEARTBEAT_INTERVAL_S, self._send_heartbeats):
            yield

    def _retry(self, trial: "optuna.Trial", reason: str) -> None:
        retries = trial.user_attrs.get(RETRIES_ATTR, 0) + 1
        if retries <= MAX_RETRIES:
            log.warning("trial %d: %s; it is taken up again", trial.number, reason)
            trial.set_user_attr(RETRIES_ATTR, retries)
            trial.set_user_attr(DRIVER_ATTR, process_identity())  # no other driver adopts it
            self._retry_queue.append(trial)
            return
        self._fail(trial, reason, retries)
        if run := trial.user_attrs.get(RUN_ATTR):
            tracking.fail(run, f"{reason}, {retries} times")

    def _fail(self, trial: "optuna.Trial", reason: str, times: int) -> None:
        from optuna.trial import TrialState

        log.warning("trial %d failed: %s %d times", trial.number, reason, times)
        self._study.tell(trial, state=TrialState.FAIL)

    def _adopt_orphans(self) -> None:
        """Queue the running trials whose driver on this machine is gone."""
        from optuna.trial import TrialState

        for frozen in studies.own_trials(self._study):
            if frozen.state != TrialState.RUNNING:
                continue
            driver = frozen.user_attrs.get(DRIVER_ATTR)
            trial = studies.reopen_trial(self._study, frozen)
            if driver == RELEASED:
                trial.set_user_attr(DRIVER_ATTR, process_identity())
                self._retry_queue.append(trial)
            elif driver is None:  # its driver has just started it, or died at that moment
                studies.send_heartbeat(trial)  # without another one it times out and fails
            elif has_exited(driver):
                self._retry(trial, "its driver was killed")

    def _max_trials(self) -> int:
        """Return how many trials the study may have; repeats of lost ones do not count."""
        from optuna.storages import fail_stale_trials

        self._send_heartbeats()  # this process may have been suspended for longer than the time-out
        with studies.without_heartbeat_warnings():
            fail_stale_trials(self._study)
        trials = self._study.get_trials(deepcopy=False)
        return self.job.sweep.trials + sum(studies.repeats_lost_trial(trial) for trial in trials)

    def _send_heartbeats(self) -> None:
        for trial in self._unfinished():
            studies.send_heartbeat(trial)

    def _unfinished(self) -> "list[optuna.Trial]":
        return [*self._running.values(), *self._retry_queue]


def _has_ended(trial: "optuna.Trial") -> bool:
    """Return whether the trial has ended: if not by us, another driver took it over."""
    return bool(studies.stored_trial(trial).state.is_finished())
