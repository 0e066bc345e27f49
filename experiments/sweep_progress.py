"""How a sweep is shown while it goes on."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from eurosat.runtime.progress import bar
from experiments import search
from experiments.drivers import SPENT
from experiments.objective import Job

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

TELL_EVERY_S = 10.0


class View:
    """What the user sees of a sweep: trials by state, the best so far, the time left."""

    def __init__(self, study: "optuna.Study", job: Job) -> None:
        self._study, self._sweep = study, job.sweep
        self._seen: dict[int, float] = {}
        self._started = self._told = time.monotonic()
        self._spent_before_s = float(study.user_attrs.get(SPENT, 0))
        self._finished_before = self._finished()

    @contextmanager
    def shown(self) -> Iterator[None]:
        with bar() as self._bar:
            self._task = self._bar.add_task("sweep", total=self._sweep.trials, note="")
            self.update()
            yield

    def update(self) -> None:
        done = self._finished()
        self._bar.update(self._task, completed=done, note=self.line())
        if self._bar.disable and time.monotonic() - self._told > TELL_EVERY_S:
            self._told = time.monotonic()
            log.info("sweep: %s", self.line())

    def heard(self, number: int, accuracy: float) -> None:
        """Of the latest epoch of a trial that has not ended."""
        self._seen[number] = accuracy
        self.update()

    def line(self) -> str:
        """Such as "3 of 20 done (1 pruned), 2 running, best 0.9712, 12 min left"."""
        sweep = self._sweep
        states = [one.state.name for one in search.own_trials(self._study)]
        done = self._finished()
        parts = [f"{done} of {sweep.trials} done"]
        ended = [f"{states.count(n)} {n.lower()}" for n in ("PRUNED", "FAIL") if n in states]
        parts[0] += f" ({', '.join(ended)})" if ended else ""
        parts.append(f"{states.count('RUNNING')} running")
        if top := search.best(self._study):
            parts.append(f"best {top.values[0]:.4f}")
        elif self._seen:
            parts.append(f"so far {max(self._seen.values()):.4f}")
        spent = time.monotonic() - self._started
        left = None
        if done > self._finished_before:
            left = spent / (done - self._finished_before) * max(0, sweep.trials - done)
        if sweep.minutes:
            budget = max(0.0, 60 * sweep.minutes - self._spent_before_s - spent)
            left = budget if left is None else min(left, budget)
        if left is not None:
            parts.append(f"about {_time(left)} left")
        return ", ".join(parts)

    def _finished(self) -> int:
        return sum(one.state.is_finished() for one in search.own_trials(self._study))


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
