"""One trial as Ray Tune runs it, in a process of its own on any node."""

import contextlib
import dataclasses
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.trainable.function_trainable import wrap_function

from eurosat import tracking
from eurosat.config import compose
from eurosat.data.prepare import prepare
from eurosat.runtime import atomic, logs
from eurosat.runtime.cache import cache_root
from eurosat.training.checkpoints import CheckpointSlot
from experiments import objective, studies
from experiments.objective import SweepJob, TrialResult, TrialSpec

SHUTDOWN_GRACE_S = 60
"""Time in which a stopped trial can end its run."""
NUMBER_KEY, LOST_KEY, JOURNAL_KEY = "trial.number", "trial.lost", "trial.journal"
"""Keys of a trial's configuration: its number in the study, how often Ray has lost its process, and
the journal of its run."""


def local_dir(job: SweepJob) -> Path:
    """Return the sweep's folder in this machine's cache.

    Its name holds the parent run: another storage may have a study of the same name.
    """
    return cache_root() / "ray" / f"{job.study}-{job.parent.removeprefix('journal:')[:8]}"


def make_trainable(job: SweepJob, retries: Mapping[int, int]) -> Any:
    """Return the trainable class; ``retries`` counts earlier retries by trial number."""
    ended_key = "_ended"

    def trial(config: Mapping[str, Any]) -> None:
        ended = threading.Event()
        globals()[ended_key] = ended  # a process runs one trial
        try:
            run_trial(job, config, retries)
        finally:
            ended.set()

    class Trial(wrap_function(trial)):  # type: ignore[misc]
        def cleanup(self) -> None:
            """Wait until the trial has ended its run: Ray ends the process after this."""
            super().cleanup()
            if ended := globals().get(ended_key):
                ended.wait(SHUTDOWN_GRACE_S)

    return Trial


def run_trial(job: SweepJob, config: Mapping[str, Any], retries: Mapping[int, int]) -> None:
    """Train the trial that ``config`` describes and report each epoch to Ray."""
    logs.setup("info")
    data = prepare(compose(job.overrides))
    number = config[NUMBER_KEY]
    own_keys = (NUMBER_KEY, LOST_KEY, JOURNAL_KEY)
    spec = TrialSpec(
        number=number,
        params={key: value for key, value in config.items() if key not in own_keys},
        retries=retries.get(number, 0) + config.get(LOST_KEY, 0),
        threads=max(1, int(job.sweep.trial_cpus)),
        journal=config[JOURNAL_KEY],
    )
    reporter = _Reporter(job)
    result_file = local_dir(job) / f"trial-{number}.json"

    def on_end(result: TrialResult) -> None:
        result_file.parent.mkdir(parents=True, exist_ok=True)
        atomic.atomic_write_text(result_file, json.dumps(dataclasses.asdict(result)))

    if result_file.exists():  # it ended, but its driver was killed before it knew
        result = TrialResult(**json.loads(result_file.read_text()))
    elif spec.retries > studies.MAX_RETRIES:
        result = TrialResult(state="fail")
    else:
        with contextlib.ExitStack() as stack:
            remote_state = None
            if checkpoint := tune.get_checkpoint():
                remote_state = Path(stack.enter_context(checkpoint.as_directory()))
            result = objective.train_trial(
                job, spec, data, reporter.on_epoch, reporter.on_start, remote_state, on_end
            )
    reporter.report_result(result)


class _Reporter:
    """Sends a trial's epochs and result to Ray."""

    def __init__(self, job: SweepJob) -> None:
        self._sweep = job.sweep
        self._best_accuracy, self._journal = 0.0, ""
        self._checkpoint_dir: Path | None = None

    def on_start(self, run: tracking.Run, checkpoint: CheckpointSlot) -> None:
        self._journal, self._checkpoint_dir = run.journal, checkpoint.directory

    def on_epoch(self, epoch: int, metrics: Mapping[str, float]) -> str | None:
        self._best_accuracy = max(self._best_accuracy, metrics["val_accuracy"])
        # the last epoch is reported by report_result, with the values of the objectives
        return self._report(epoch + 1) if epoch + 1 < self._sweep.trial_epochs else None

    def report_result(self, result: TrialResult) -> None:
        """Report a trial that is complete or failed; Ray has pruned the others itself."""
        if result.state == "complete":
            self._best_accuracy = result.values[0]
            names = self._sweep.objective_names
            values = dict(zip(names, result.values, strict=True))
            self._report(self._sweep.trial_epochs, **values)
        elif result.state == "fail":  # no exception: Ray would train it again, to fail again
            self._report(self._sweep.trial_epochs, failed=True)

    def _report(self, epochs_done: int, **values: Any) -> str | None:
        """Report to Ray; return why the trial must stop, or None."""
        checkpoint, folder = None, self._checkpoint_dir
        if self._sweep.ray_address and folder and folder.exists():  # for a node that takes over
            checkpoint = tune.Checkpoint.from_directory(folder)
        metrics = {
            "accuracy": self._best_accuracy,
            "done_epochs": epochs_done,
            "run": self._journal,
        }
        try:
            tune.report(metrics | values, checkpoint=checkpoint)
        except SystemExit:  # Ray stops a trial by it
            return "pruned"
        return None
