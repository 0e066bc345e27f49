"""Train on one device, on several of this machine, or on a Ray cluster."""

import json
import logging
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from eurosat import tracking
from eurosat.config import TrainConfig
from eurosat.data.prepare import PreparedData, prepare
from eurosat.errors import EuroSATError
from eurosat.models import network, pretrained
from eurosat.runtime import exit_codes, logs, process, ray_cluster, telemetry, worker_processes
from eurosat.runtime.distributed import DistributedContext, launcher_environment
from eurosat.runtime.progress import STYLE
from eurosat.training import distillation
from eurosat.training.callbacks import EpochHook
from eurosat.training.checkpoints import CheckpointSlot
from eurosat.training.fit import FitResult
from eurosat.training.fit import fit as fit_in_process

SHUTDOWN_GRACE_S = 10
"""A failing rank has this long to log its error before it counts as lost."""


def fit(
    config: TrainConfig,
    data: PreparedData,
    run: tracking.Run,
    on_epoch: EpochHook | None = None,
    slot: CheckpointSlot | None = None,
) -> FitResult:
    """Train as `eurosat.training.fit.fit` does, with the configuration's launcher and devices.

    Raises:
        EuroSATError: one of several processes was lost.
        DataError: the initial weights or the teacher may have learned from this test fold.
    """
    config = pretrained.resolve_initial_run(
        distillation.resolve_teacher(config, data, run), data, run
    )
    if config.launcher == "ray":
        return _fit_on_ray(config, run)
    if config.trainer.devices == 1:
        return fit_in_process(config, data, run, on_epoch, slot)
    world = config.trainer.devices
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with (
        _environment(launcher_environment(0, world, port)),
        _worker_processes(config, world, port, slot) as workers,
    ):
        try:
            ranks = DistributedContext.from_environment(owns_process_group=True)
            return fit_in_process(config, data, run, on_epoch, slot, ranks)
        except RuntimeError as error:  # gloo and NCCL raise it if a peer is gone
            for worker in workers:
                worker.join(timeout=SHUTDOWN_GRACE_S)
            if lost := [worker.name for worker in workers if worker.exitcode]:
                raise EuroSATError(
                    f"{', '.join(lost)} of {world} processes failed: see the log above, and run "
                    "the same command again to continue"
                ) from error
            raise


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables while the context is active."""
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
    config: TrainConfig, world: int, port: int, slot: CheckpointSlot | None
) -> Iterator[list[BaseProcess]]:
    """Start all ranks but the first; they are joined, or killed after an error, at the end."""
    level = logging.getLevelName(logging.getLogger().level).lower()
    workers: list[BaseProcess] = [
        worker_processes.create(
            _worker_main,
            (config, dict(launcher_environment(rank, world, port)), slot, level),
            name=f"rank {rank}",
        )
        for rank in range(1, world)
    ]
    for worker in workers:
        worker.start()
    try:
        yield workers
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
            worker.join()


def _worker_main(
    config: TrainConfig, variables: dict[str, str], slot: CheckpointSlot | None, level: str
) -> None:
    """Train as one of the ranks after the first, which log nothing to the run."""
    os.environ.update(variables)
    os.environ[STYLE] = "lines"  # only the first rank draws a progress bar
    logs.setup("warning" if level == "info" else level)

    def train() -> int:
        ranks = DistributedContext.from_environment(owns_process_group=True)
        fit_in_process(config, prepare(config), tracking.NullRun(), None, slot, ranks)
        return exit_codes.OK

    process.run(train)


def _fit_on_ray(config: TrainConfig, run: tracking.Run) -> FitResult:
    """Train with workers of Ray Train; the first one logs to the run and returns its weights.

    ``RAY_ADDRESS`` names the cluster; without it one is started on this machine. All nodes must
    reach the data, the tracking server and ``RAY_STORAGE``, the folder or bucket through which the
    weights are returned.
    """
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray_cluster.join(os.environ.get("RAY_ADDRESS"), tracking.tracking_uri())
    resources: Any = ray.cluster_resources  # untyped
    gpus = resources().get("GPU", 0) >= config.trainer.devices
    with tempfile.TemporaryDirectory() as local:
        trainer = TorchTrainer(
            _ray_worker,
            train_loop_config={
                "config": config,
                "run": run.run_id,
                "server": tracking.tracking_uri(),
            },
            scaling_config=ScalingConfig(num_workers=config.trainer.devices, use_gpu=gpus),
            run_config=RunConfig(
                name=run.run_id, storage_path=os.environ.get("RAY_STORAGE") or local
            ),
        )
        checkpoint = trainer.fit().checkpoint
        if checkpoint is None:
            raise EuroSATError(
                "Ray's workers ended without weights: see the log above, and run the command again"
            )
        with checkpoint.as_directory() as folder:
            result = json.loads(Path(folder, "fitted.json").read_text())
            return FitResult(network=network.load(Path(folder, "weights.safetensors")), **result)


def _ray_worker(job: dict[str, Any]) -> None:
    """Train as one worker of Ray Train; ``job`` is the ``train_loop_config``."""
    import ray.train
    from ray.train import Checkpoint

    telemetry.turn_off()
    os.environ["MLFLOW_TRACKING_URI"] = job["server"]
    os.environ[STYLE] = "lines"
    logs.setup("info")
    ranks = DistributedContext.from_environment(owns_process_group=False)
    config: TrainConfig = job["config"]
    shared_run = tracking.append_to(job["run"]) if ranks.is_first else None
    with shared_run or nullcontext(tracking.NullRun()) as run:
        fitted = fit_in_process(config, prepare(config), run, ranks=ranks)
    if not ranks.is_first:
        ray.train.report({})
        return
    with tempfile.TemporaryDirectory() as folder:
        network.save(fitted.network, Path(folder, "weights.safetensors"))
        result = {"history": fitted.history, "seconds": fitted.seconds}
        Path(folder, "fitted.json").write_text(json.dumps(result))
        ray.train.report({}, checkpoint=Checkpoint.from_directory(folder))
