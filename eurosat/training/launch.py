"""Fit on one device, on several of this machine, or on a Ray cluster."""

import json
import logging
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from eurosat import tracking
from eurosat.config import TrainConfig
from eurosat.data.prepare import PreparedData, prepare
from eurosat.errors import EuroSATError
from eurosat.models import network, pretrained
from eurosat.runtime import exit_codes, logs, process, ray_cluster, telemetry
from eurosat.runtime.distributed import DistributedContext, launcher_environment
from eurosat.runtime.progress import STYLE
from eurosat.training import distillation
from eurosat.training.callbacks import EpochHook
from eurosat.training.checkpoints import CheckpointSlot
from eurosat.training.fit import FitResult
from eurosat.training.fit import fit as fit_alone

SHUTDOWN_GRACE_S = 10
"""A rank that fails by itself is given so long to say why before it counts as lost."""


def fit(
    config: TrainConfig,
    data: PreparedData,
    run: tracking.Run,
    on_epoch: EpochHook | None = None,
    saved: CheckpointSlot | None = None,
) -> FitResult:
    """As `eurosat.training.fit.fit`, on as many devices and where the configuration says.

    Raises:
        EuroSATError: a process of several was lost.
        DataError: the first weights or the teacher come from a run that may know this test fold.
    """
    config = pretrained.resolve_initial_run(
        distillation.resolve_teacher(config, data, run), data, run
    )
    if config.launcher == "ray":
        return _fit_on_ray(config, run)
    if config.trainer.devices == 1:
        return fit_alone(config, data, run, on_epoch, saved)
    world = config.trainer.devices
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with (
        _variables(launcher_environment(0, world, port)),
        _worker_processes(config, world, port, saved) as others,
    ):
        try:
            ranks = DistributedContext.from_environment(owns_process_group=True)
            return fit_alone(config, data, run, on_epoch, saved, ranks)
        except RuntimeError as error:  # what gloo and NCCL raise when a peer is gone
            for other in others:
                other.join(timeout=SHUTDOWN_GRACE_S)
            if lost := [other.name for other in others if other.exitcode]:
                raise EuroSATError(
                    f"{', '.join(lost)} of {world} processes was lost: see the log above, and "
                    "start the same command again to continue"
                ) from error
            raise


@contextmanager
def _variables(values: Any) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _worker_processes(
    config: TrainConfig, world: int, port: int, saved: CheckpointSlot | None
) -> Iterator[list[BaseProcess]]:
    """All ranks but the first, ended with the block."""
    context = multiprocessing.get_context("spawn")
    level = logging.getLevelName(logging.getLogger().level).lower()
    others: list[BaseProcess] = [
        context.Process(
            target=_worker_main,
            args=(config, dict(launcher_environment(rank, world, port)), saved, level),
            name=f"rank {rank}",
        )
        for rank in range(1, world)
    ]
    for other in others:
        other.start()
    try:
        yield others
        for other in others:
            other.join()
    finally:
        for other in others:
            if other.is_alive():
                other.kill()
            other.join()


def _worker_main(
    config: TrainConfig, variables: dict[str, str], saved: CheckpointSlot | None, level: str
) -> None:
    """One of the ranks after the first: its share of every batch, and not a word in the run."""
    os.environ.update(variables)
    os.environ[STYLE] = "lines"  # the terminal has one bar, the first rank's
    logs.setup("warning" if level == "info" else level)

    def train() -> int:
        ranks = DistributedContext.from_environment(owns_process_group=True)
        fit_alone(config, prepare(config), tracking.NullRun(), None, saved, ranks)
        return exit_codes.OK

    process.run(train)


def _fit_on_ray(config: TrainConfig, run: tracking.Run) -> FitResult:
    """Workers of Ray Train; the first logs into the run and hands its weights back.

    ``RAY_ADDRESS`` names the cluster; without it one is started on this machine. Data and the
    tracking server must be within reach of every node, and so must ``RAY_STORAGE``, the
    folder or bucket that the weights come back through.
    """
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray_cluster.join(os.environ.get("RAY_ADDRESS"), tracking.tracking_uri())
    resources: Any = ray.cluster_resources  # untyped
    gpus = resources().get("GPU", 0) >= config.trainer.devices
    with tempfile.TemporaryDirectory() as here:
        trainer = TorchTrainer(
            _ray_worker,
            train_loop_config={
                "config": config,
                "run": run.run_id,
                "server": tracking.tracking_uri(),
            },
            scaling_config=ScalingConfig(num_workers=config.trainer.devices, use_gpu=gpus),
            run_config=RunConfig(
                name=run.run_id, storage_path=os.environ.get("RAY_STORAGE") or here
            ),
        )
        checkpoint = trainer.fit().checkpoint
        if checkpoint is None:
            raise EuroSATError("Ray's workers ended without weights: see the log above")
        with checkpoint.as_directory() as folder:
            told = json.loads(Path(folder, "fitted.json").read_text())
            return FitResult(network=network.load(Path(folder, "weights.safetensors")), **told)


def _ray_worker(given: dict[str, Any]) -> None:
    import ray.train
    from ray.train import Checkpoint

    telemetry.turn_off()
    os.environ["MLFLOW_TRACKING_URI"] = given["server"]
    os.environ[STYLE] = "lines"
    logs.setup("info")
    ranks = DistributedContext.from_environment(owns_process_group=False)
    config: TrainConfig = given["config"]
    with (
        tracking.append_to(given["run"]) if ranks.is_first else nullcontext(tracking.NullRun())
    ) as run:
        fitted = fit_alone(config, prepare(config), run, ranks=ranks)
    if not ranks.is_first:
        ray.train.report({})
        return
    with tempfile.TemporaryDirectory() as folder:
        network.save(fitted.network, Path(folder, "weights.safetensors"))
        told = {"history": fitted.history, "seconds": fitted.seconds}
        Path(folder, "fitted.json").write_text(json.dumps(told))
        ray.train.report({}, checkpoint=Checkpoint.from_directory(folder))
