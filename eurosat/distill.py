"""What a trained network, the teacher, answers to each training tile, as targets for another."""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from eurosat import tracking
from eurosat.config import TrainConfig
from eurosat.errors import DataError, ModelError, TrackingError
from eurosat.prepare import Prepared

if TYPE_CHECKING:
    from eurosat.batches import Targets
    from eurosat.machine import Compute
    from eurosat.network import Network

log = logging.getLogger(__name__)

TEACHER = "distill.teacher.run_id"
"""Tag of the run: a training that is continued keeps its teacher."""


def settled(config: TrainConfig, data: Prepared, run: tracking.Run) -> TrainConfig:
    """The configuration with the one run that teaches, the same whenever ``run`` is continued.

    Raises:
        DataError: the teacher learned from another split: it may have seen this test fold.
        TrackingError: there is no such run.
    """
    if config.distill.teacher == "none":
        return config
    run_id = run.tag(TEACHER) or find(config, data)
    name = "split.fingerprint"
    its, ours = tracking.get(run_id).tags.get(name), data.fingerprints[name]
    if its != ours:
        raise DataError(
            f"the teacher, run {run_id}, has {name} {its}, and the data here {ours}: it may have "
            "learned from tiles of this test fold; train it on this split"
        )
    run.set_tags({TEACHER: run_id})
    return replace(config, distill=replace(config.distill, teacher=f"runs:/{run_id}"))


def targets(config: TrainConfig, data: Prepared, compute: "Compute") -> "Targets | None":
    """(N, K) for all tiles of the pack, those of the train fold filled; None without a teacher.

    ``config`` is `settled`.

    Raises:
        ModelError: the teacher tells other classes apart, or reads other bands.
        TrackingError: there is no such run.
    """
    from eurosat import calibration, module
    from eurosat.batches import Batches

    if config.distill.teacher == "none":
        return None
    run_id = tracking.resolve_run(config.distill.teacher)
    teacher = _load(run_id, data)
    teacher.to(compute.device, memory_format=compute.memory_format)  # type: ignore[call-overload]
    rows = data.split.indices("train")
    log.info("asking the teacher, run %s, about %d tiles", run_id, len(rows))
    with compute.autocast():
        logits, labels = module.logits(teacher, Batches(data.pack, rows))
    told = calibration.softmax(logits / config.distill.temperature)
    share = config.distill.share
    mixed = np.zeros((len(data.pack.labels), told.shape[1]), np.float32)
    mixed[rows] = share * told + (1 - share) * np.eye(told.shape[1])[labels]
    return mixed


def find(config: TrainConfig, data: Prepared) -> str:
    """The run that ``distill.teacher`` stands for.

    Raises:
        TrackingError: no such run, or no finished one of that recipe on this data and split.
    """
    reference = config.distill.teacher
    if reference.startswith(("runs:/", "models:/")):
        return tracking.resolve_run(reference)
    tags = {"kind": "train", **data.fingerprints}
    if found := tracking.finished_runs(config.experiment, tags, {"recipe": reference}):
        return found[0]
    raise TrackingError(
        f"distill.teacher={reference}: experiment {config.experiment} has no finished run of that "
        f"recipe on this data and split; train it first (python -m eurosat.train "
        f"recipe={reference} ...), or give runs:/ID"
    )


def _load(run_id: str, data: Prepared) -> "Network":
    from eurosat import network

    with tracking.artifact(run_id, "weights.safetensors") as file:
        teacher = network.load(file)
    wanted: tuple[Any, ...] = (data.pack.classes, data.pack.bands)
    if (teacher.spec.classes, teacher.spec.bands) != wanted:
        raise ModelError(
            f"the teacher, run {run_id}, tells {', '.join(teacher.spec.classes)} apart in "
            f"{teacher.spec.bands} bands; the data hold {', '.join(wanted[0])} in {wanted[1]}"
        )
    return teacher
