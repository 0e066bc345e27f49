"""Progress of a sweep: a bar on a terminal, log lines elsewhere."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from eurosat.runtime.progress import bar
from experiments import studies
from experiments.objective import SweepJob
from experiments.ownership import SPENT_ATTR

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

LOG_INTERVAL_S = 10.0


class SweepProgress:
    """Shows trials by state, the best accuracy so far and the estimated time left."""

    def __init__(self, study: "optuna.Study", job: SweepJob) -> None:
        self._study, self._sweep = study, job.sweep
        self._latest_accuracy: dict[int, float] = {}
        self._started = self._last_logged = time.monotonic()
        self._spent_before_s = float(study.user_attrs.get(SPENT_ATTR, 0))
        self._finished_before = self._count_finished()

    @contextmanager
    def display(self) -> Iterator[None]:
        with bar() as self._bar:
            self._task = self._bar.add_task("sweep", total=self._sweep.trials, note="")
            self.update()
            yield

    def update(self) -> None:
        self._bar.update(self._task, completed=self._count_finished(), note=self.summary())
        if self._bar.disable and time.monotonic() - self._last_logged > LOG_INTERVAL_S:
            self._last_logged = time.monotonic()
            log.info("sweep: %s", self.summary())

    def record_accuracy(self, number: int, accuracy: float) -> None:
        """Record the validation accuracy of a running trial's latest epoch."""
        self._latest_accuracy[number] = accuracy
        self.update()

    def summary(self) -> str:
        """Such as "3 of 20 done (1 pruned), 2 running, best 0.9712, about 12 min left"."""
        states = [trial.state.name for trial in studies.own_trials(self._study)]
        not_complete = [
            f"{states.count(state)} {state.lower()}"
            for state in ("PRUNED", "FAIL")
            if state in states
        ]
        done = f"{self._count_finished()} of {self._sweep.trials} done"
        parts = [f"{done} ({', '.join(not_complete)})" if not_complete else done]
        parts.append(f"{states.count('RUNNING')} running")
        if best := studies.best_trial(self._study):
            parts.append(f"best {best.values[0]:.4f}")
        elif self._latest_accuracy:
            parts.append(f"so far {max(self._latest_accuracy.values()):.4f}")
        remaining_s = self._remaining_s()
        if remaining_s is not None:
            parts.append(f"about {_format_duration(remaining_s)} left")
        return ", ".join(parts)

    def _remaining_s(self) -> float | None:
        """Estimate the time for the trials left, at most what ``minutes`` leaves."""
        elapsed_s = time.monotonic() - self._started
        finished = self._count_finished()
        remaining_s = None
        if finished > self._finished_before:
            per_trial_s = elapsed_s / (finished - self._finished_before)
            remaining_s = per_trial_s * max(0, self._sweep.trials - finished)
        if self._sweep.minutes:
            budget_s = max(0.0, 60 * self._sweep.minutes - self._spent_before_s - elapsed_s)
            remaining_s = budget_s if remaining_s is None else min(remaining_s, budget_s)
        return remaining_s

    def _count_finished(self) -> int:
        return sum(trial.state.is_finished() for trial in studies.own_trials(self._study))


def _format_duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
