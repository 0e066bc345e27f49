"""What a trial is, whichever engine runs it: a short training below the sweep's run."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eurosat import tracking, train
from eurosat.config import TrainConfig, compose
from eurosat.data.prepare import PreparedData
from eurosat.errors import NonFiniteLoss
from eurosat.training.checkpoints import CheckpointSlot, acquire
from experiments.settings import SweepConfig

if TYPE_CHECKING:
    from eurosat.models.network import Network

log = logging.getLogger(__name__)

LATENCY_TILES = 50
"""One after the other; their median is the latency."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The same for all trials of a sweep."""

    sweep: SweepConfig
    study: str
    overrides: tuple[str, ...]
    parent: str
    """The parent run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One trial."""

    number: int
    """Of the trial in its study."""
    values: Mapping[str, Any]
    """What the sampler suggested for keys of the recipe."""
    retries: int = 0
    threads: int = 0
    journal: str | None = None
    """Of its run, where that is known before it has begun."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    state: Literal["complete", "pruned", "fail"]
    values: tuple[float, ...] = ()
    """Of the objectives."""
    run_id: str = ""


Report = Callable[[int, Mapping[str, float]], str | None]
"""Hears of each epoch (from 0) and its metrics; answers why to stop, or None to go on."""


class Stopped(Exception):
    """A trial is ended before its last epoch."""


def run(
    job: Job,
    task: Task,
    data: PreparedData,
    report: Report,
    begun: Callable[[tracking.Run, CheckpointSlot], None],
    left: Path | None = None,
    ended: Callable[[Outcome], None] = lambda _: None,
) -> Outcome:
    """Train one trial; one that was killed goes on where its last whole epoch ended.

    ``begun`` hears its run, and where its state is kept; ``left`` holds what it left on another
    machine. Its state is dropped once ``ended`` has heard of the outcome: where that raises, or
    the process is killed before, the trial is not trained again.
    """
    config = trial_config(job, task)
    label = f"trial {task.number + 1}"
    # not the state of another sweep's trial that happened to try the same
    place = {**data.fingerprints, "study": job.study, "trial": str(task.number)}
    tags = {"kind": "trial", "study": job.study, "trial.number": task.number}
    if task.retries:
        tags["trial.retries"] = task.retries
    run_id = ""
    try:
        with acquire(config, place, exclusive=True) as saved:
            if left:
                saved.import_from(left)
            if saved.outcome:  # and its process was killed before it could tell
                told = saved.outcome
                outcome = Outcome(
                    state=told.get("state", "complete"),
                    values=tuple(told["values"]),
                    run_id=told["run_id"],
                )
                if saved.journal:
                    whole = outcome.state == "complete"
                    tracking.end(saved.journal, "FINISHED" if whole else "KILLED")
                ended(outcome)
                return outcome
            try:
                with tracking.run(
                    config.experiment,
                    label,
                    parent=job.parent,
                    journal=saved.start_or_resume(task.journal),
                    resume=saved.journal,
                    tags=tags,
                    killed_by=(Stopped,),
                ) as opened:
                    run_id = opened.run_id
                    begun(opened, saved)
                    values = _trained(job, config, data, opened, saved, report, label)
                    run_id = opened.run_id
                    saved.record_outcome({"state": "complete", "values": values, "run_id": run_id})
                outcome = Outcome(state="complete", values=values, run_id=run_id)
            except (Stopped, NonFiniteLoss) as error:
                log.info("%s: %s", label, error)
                state: Literal["pruned", "fail"] = "fail"
                if isinstance(error, Stopped):
                    state = "pruned"
                outcome = Outcome(state=state, run_id=run_id)
            ended(outcome)
            return outcome
    except BaseException:
        log.info("%s: interrupted; its state is kept", label)
        raise


def _trained(
    job: Job,
    config: TrainConfig,
    data: PreparedData,
    run: tracking.Run,
    saved: CheckpointSlot,
    report: Report,
    label: str,
) -> tuple[float, ...]:
    from eurosat.training import launch

    def on_epoch(epoch: int, metrics: Mapping[str, float]) -> None:
        why = report(epoch, metrics)
        if why and epoch + 1 < config.trainer.epochs:
            run.set_tags({"pruned": "true", "pruned.epoch": epoch + 1, "pruned.why": why})
            saved.record_outcome({"state": "pruned", "values": (), "run_id": run.run_id})
            raise Stopped(f"{why} after epoch {epoch + 1}")

    if not saved.is_described and run.tag("config.digest") is None:  # nor where it was begun
        train.describe(config, data, run)
        saved.mark_described()
    fitted = launch.fit(config, data, run, on_epoch, saved)
    values = [fitted.best["val_accuracy"]]
    if "latency" in job.sweep.aims:
        values.append(latency_ms(fitted.network))
        run.log_metrics({"latency_ms": values[-1]})
    return tuple(values)


def latency_ms(network: "Network") -> float:
    """Median time for one tile on one CPU thread."""
    import torch

    spec, taken = network.spec, []
    tile = torch.zeros((1, spec.bands, *spec.tile_size), dtype=torch.uint8)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        network.eval()
        with torch.inference_mode():
            for _ in range(LATENCY_TILES):
                started = time.perf_counter()
                network(tile)
                taken.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return 1000 * sorted(taken)[len(taken) // 2]


def trial_config(job: Job, task: Task) -> TrainConfig:
    """The recipe with what the sampler suggested, for a trial's few epochs."""
    of_trial = {**task.values, "trainer.epochs": job.sweep.trial_epochs}
    if task.threads:
        of_trial["trainer.threads"] = task.threads
    return compose([*job.overrides, *as_overrides(of_trial)])


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]
