"""What one network, the teacher, sees in each training tile and answers, as targets for another."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import zipfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from eurosat import tracking
from eurosat.config import PACKAGED, ModelConfig, TrainConfig
from eurosat.data import bands
from eurosat.data.prepare import PreparedData
from eurosat.errors import DataError, ModelError, TrackingError
from eurosat.runtime import atomic, cache

if TYPE_CHECKING:
    from eurosat.data.arrays import Floats
    from eurosat.data.loaders import SoftTargets
    from eurosat.models.compute import Compute
    from eurosat.models.network import Network

log = logging.getLogger(__name__)

TEACHER = "distill.teacher.run_id"
"""Tag of the run: a training that is continued keeps its teacher."""
AXES = 128
"""Of a teacher's features, the widest; the log says how much of their variance they hold."""
FORMAT = 1
"""Of what is kept of a teacher: where it changes, teachers are asked anew."""
PACKAGED_SIZE = 128
"""Side to which the packaged teacher's tiles are scaled, as in the recipe efficientnet-lite0."""


def resolve_teacher(config: TrainConfig, data: PreparedData, run: tracking.Run) -> TrainConfig:
    """The configuration with the one run that teaches, the same whenever ``run`` is continued.

    Raises:
        DataError: the teacher learned from another split: it may have seen this test fold.
        TrackingError: there is no such run.
    """
    if config.distill.teacher in ("none", PACKAGED):
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


def targets(config: TrainConfig, data: PreparedData, compute: "Compute") -> "SoftTargets | None":
    """A row for each tile of the pack, those of the train fold filled; None without a teacher.

    (N, K) shares of the classes and, where features are asked for, their principal axes behind
    them. ``config`` is `resolve_teacher`. What a teacher has told is kept in the cache.

    Raises:
        ModelError: the teacher tells other classes apart, or reads other bands.
        TrackingError: there is no such run.
    """
    from eurosat.evaluation import calibration

    teaching = config.distill
    if teaching.teacher == "none" or not (teaching.share or teaching.features):
        return None
    axes, logits = _cached_outputs(config, data, compute)
    rows = data.split.indices("train")
    labels = np.eye(len(data.pack.classes))[data.pack.labels[rows]]
    answers = calibration.softmax(logits / teaching.temperature) if teaching.share else 0
    parts = [teaching.share * answers + (1 - teaching.share) * labels]
    if teaching.features:
        parts.append(axes)
    known = np.concatenate(parts, axis=1)
    filled = np.zeros((len(data.pack.labels), known.shape[1]), np.float32)
    filled[rows] = known
    return filled


def principal_axes(features_NF: "Floats") -> "Floats":
    """(N, `AXES`) at most: where the features differ most, around 0, in all at a variance of 1.

    An axis points where its largest component is positive: another machine finds the same.
    """
    centred = features_NF - features_NF.mean(axis=0)
    spreads, vectors = np.linalg.eigh(np.cov(centred, rowvar=False))
    vectors = vectors[:, ::-1][:, :AXES]
    largest = np.take_along_axis(vectors, abs(vectors).argmax(axis=0)[None], axis=0)
    axes = centred @ (vectors * np.sign(largest))
    held = spreads[::-1][:AXES].sum() / max(spreads.sum(), 1e-12)
    log.info("%d axes hold %.2f of the variance of its features", axes.shape[1], held)
    scaled: Floats = axes / max(axes.std(), 1e-12)
    return scaled


def _cached_outputs(
    config: TrainConfig, data: PreparedData, compute: "Compute"
) -> "tuple[Floats, Floats]":
    """Principal axes and logits of the train fold, asked for once on this machine."""
    from filelock import FileLock

    teacher, features = config.distill.teacher, bool(config.distill.features)
    if teacher != PACKAGED:
        teacher = tracking.resolve_run(teacher)
    root = config.data.cache_dir / "teachers"
    root.mkdir(parents=True, exist_ok=True)
    cache.prune_expired(root)
    asked = [
        FORMAT,
        AXES,
        PACKAGED_SIZE,
        teacher,
        features,
        data.fingerprints,
        config.data.decode_options,
    ]
    key = json.dumps([*asked, dataclasses.asdict(compute)], sort_keys=True, default=str)
    file = root / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    with FileLock(f"{file}.lock"):  # several trials or ranks need one answer
        with contextlib.suppress(OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            with np.load(file, allow_pickle=False) as kept:
                told = kept["axes"], kept["logits"]
            with contextlib.suppress(OSError):  # another user's
                file.touch()
            return told
        axes, logits = _run_teacher(teacher, data, compute, features=features)
        with contextlib.suppress(OSError):  # the next one asks again
            atomic.atomic_write(file, lambda opened: np.savez(opened, axes=axes, logits=logits))
    return axes, logits


def _run_teacher(
    teacher: str, data: PreparedData, compute: "Compute", *, features: bool
) -> "tuple[Floats, Floats]":
    from eurosat.data.loaders import TileLoader
    from eurosat.models import predict

    net = _packaged(data) if teacher == PACKAGED else _load(teacher, data)
    net.to(compute.device, memory_format=compute.memory_format)  # type: ignore[call-overload]
    batches = TileLoader(data.pack, data.split.indices("train"))
    log.info("asking the teacher, %s, about %d tiles", teacher, len(data.split.indices("train")))
    with compute.autocast():
        if not features:
            logits, _ = predict.logits(net, batches)
            return np.empty((len(logits), 0), np.float32), logits
        colours = bands.rgb_indices() if net.spec.bands < data.pack.bands else slice(None)
        (seen, logits), _ = predict.run_over(
            net, batches, lambda tiles_NCHW: net.forward_with_features(tiles_NCHW[:, colours])
        )
    return principal_axes(seen).astype(np.float32), logits


def find(config: TrainConfig, data: PreparedData) -> str:
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


def _load(run_id: str, data: PreparedData) -> "Network":
    from eurosat.models import network

    with tracking.artifact(run_id, "weights.safetensors") as file:
        teacher = network.load(file)
    wanted: tuple[Any, ...] = (data.pack.classes, data.pack.bands)
    if (teacher.spec.classes, teacher.spec.bands) != wanted:
        raise ModelError(
            f"the teacher, run {run_id}, tells {', '.join(teacher.spec.classes)} apart in "
            f"{teacher.spec.bands} bands; the data hold {', '.join(wanted[0])} in {wanted[1]}"
        )
    return teacher


def _packaged(data: PreparedData) -> "Network":
    """EfficientNet-Lite0 as it came from ImageNet; it sees the colours of a tile."""
    from eurosat.models import pretrained

    if data.pack.bands not in (pretrained.COLOURS, len(bands.NAMES)):
        raise ModelError(
            f"the teacher {PACKAGED} sees red, green and blue, or those of {len(bands.NAMES)} "
            f"bands; the data hold {data.pack.bands} bands: say distill.teacher=none"
        )
    return pretrained.create(
        ModelConfig(name=pretrained.PACKAGED_MODEL, input_size=PACKAGED_SIZE),
        PACKAGED,
        classes=data.pack.classes,
        bands=pretrained.COLOURS,
        tile_size=(PACKAGED_SIZE, PACKAGED_SIZE),
        mean=pretrained.IMAGENET_MEAN,
        std=pretrained.IMAGENET_STD,
    )
