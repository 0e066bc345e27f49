"""One trial, for both engines: a short training whose run is a child of the sweep's run."""

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
"""Tiles that are timed one after the other; the latency is the median."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepJob:
    """What all trials of a sweep share. Stored as JSON in the study."""

    sweep: SweepConfig
    study: str
    """Name of the study."""
    overrides: tuple[str, ...]
    """Overrides of the recipe, as ``key=value``."""
    parent: str
    """Journal of the parent run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSpec:
    """What one trial trains."""

    number: int
    """Optuna's number of the trial, from 0."""
    params: Mapping[str, Any]
    """The sampler's values by dotted key of the recipe."""
    retries: int = 0
    threads: int = 0
    """CPU threads; 0 keeps the recipe's."""
    journal: str | None = None
    """Journal of its run, if it is known before the run starts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialResult:
    """How a trial ended. Stored as JSON by the engine ``ray``."""

    state: Literal["complete", "pruned", "fail"]
    values: tuple[float, ...] = ()
    """Values of the objectives, in their order."""
    run_id: str = ""


ReportEpoch = Callable[[int, Mapping[str, float]], str | None]
"""Called after each epoch (from 0) with its metrics; returns why to stop, or None to go on."""


class TrialPruned(Exception):
    """A trial is stopped before its last epoch."""


def train_trial(
    job: SweepJob,
    spec: TrialSpec,
    data: PreparedData,
    report_epoch: ReportEpoch,
    on_start: Callable[[tracking.Run, CheckpointSlot], None],
    remote_state: Path | None = None,
    on_end: Callable[[TrialResult], None] = lambda _: None,
) -> TrialResult:
    """Train one trial, or continue one that was killed after its last complete epoch.

    ``on_start`` gets the run and the place of its checkpoints; ``remote_state`` is a folder with
    the checkpoint of another machine. The checkpoint is deleted only after ``on_end`` has returned:
    if it raises, or the process is killed before, the trial is not trained again.
    """
    config = trial_config(job, spec)
    label = f"trial {spec.number}"
    # with study and number: another sweep's trial may have the same configuration
    identity = {**data.fingerprints, "study": job.study, "trial": str(spec.number)}
    tags = {"kind": "trial", "study": job.study, "trial.number": spec.number}
    if spec.retries:
        tags["trial.retries"] = spec.retries
    run_id = ""
    try:
        with acquire(config, identity, exclusive=True) as checkpoint:
            if remote_state:
                checkpoint.import_from(remote_state)
            if checkpoint.outcome:  # its process was killed before it could call on_end
                result = _recorded_result(checkpoint)
                on_end(result)
                return result
            try:
                with tracking.run(
                    config.experiment,
                    label,
                    parent=job.parent,
                    journal=checkpoint.start_or_resume(spec.journal),
                    resume=checkpoint.journal,
                    tags=tags,
                    killed_by=(TrialPruned,),
                ) as run:
                    run_id = run.run_id
                    on_start(run, checkpoint)
                    values = _fit(job, config, data, run, checkpoint, report_epoch)
                    run_id = run.run_id
                    outcome = {"state": "complete", "values": values, "run_id": run_id}
                    checkpoint.record_outcome(outcome)
                result = TrialResult(state="complete", values=values, run_id=run_id)
            except TrialPruned as reason:
                log.info("%s: %s", label, reason)
                result = TrialResult(state="pruned", run_id=run_id)
            except NonFiniteLoss as error:
                log.info("%s: %s", label, error)
                result = TrialResult(state="fail", run_id=run_id)
            on_end(result)
            return result
    except BaseException:
        log.info("%s was interrupted; its checkpoint is kept", label)
        raise


def _recorded_result(checkpoint: CheckpointSlot) -> TrialResult:
    """Return the result that a killed process has recorded, and give its run the right status."""
    recorded = checkpoint.outcome
    assert recorded is not None
    result = TrialResult(
        state=recorded.get("state", "complete"),
        values=tuple(recorded["values"]),
        run_id=recorded["run_id"],
    )
    if checkpoint.journal:
        status: tracking.Status = "FINISHED" if result.state == "complete" else "KILLED"
        tracking.end(checkpoint.journal, status)
    return result


def _fit(
    job: SweepJob,
    config: TrainConfig,
    data: PreparedData,
    run: tracking.Run,
    checkpoint: CheckpointSlot,
    report_epoch: ReportEpoch,
) -> tuple[float, ...]:
    """Train; return the values of the objectives.

    Raises:
        TrialPruned: ``report_epoch`` gave a reason to stop.
        NonFiniteLoss: the training diverged.
    """
    from eurosat.training import launch

    def on_epoch(epoch: int, metrics: Mapping[str, float]) -> None:
        reason = report_epoch(epoch, metrics)
        if reason and epoch + 1 < config.trainer.epochs:
            run.set_tags({"pruned": "true", "pruned.epoch": epoch + 1, "pruned.why": reason})
            checkpoint.record_outcome({"state": "pruned", "values": (), "run_id": run.run_id})
            raise TrialPruned(f"{reason} after epoch {epoch + 1}")

    if not checkpoint.is_described and run.tag("config.digest") is None:  # another machine may have
        train.describe(config, data, run)
        checkpoint.mark_described()
    fitted = launch.fit(config, data, run, on_epoch, checkpoint)
    values = [fitted.best["val_accuracy"]]
    if "latency" in job.sweep.objective_names:
        values.append(latency_ms(fitted.network))
        run.log_metrics({"latency_ms": values[-1]})
    return tuple(values)


def latency_ms(network: "Network") -> float:
    """Return the median time for one tile on one CPU thread, in milliseconds."""
    import torch

    spec, durations_s = network.spec, []
    tile = torch.zeros((1, spec.bands, *spec.tile_size), dtype=torch.uint8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        network.eval()
        with torch.inference_mode():
            for _ in range(LATENCY_TILES):
                started = time.perf_counter()
                network(tile)
                durations_s.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return 1000 * sorted(durations_s)[len(durations_s) // 2]


def trial_config(job: SweepJob, spec: TrialSpec) -> TrainConfig:
    """Return the recipe with the sampler's values and the epochs of a trial."""
    changes = {**spec.params, "trainer.epochs": job.sweep.trial_epochs}
    if spec.threads:
        changes["trainer.threads"] = spec.threads
    return compose([*job.overrides, *as_overrides(changes)])


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]
