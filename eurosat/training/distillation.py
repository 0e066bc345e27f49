"""Knowledge distillation: a teacher network's outputs and features as training targets."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import zipfile
from dataclasses import replace
from typing import TYPE_CHECKING

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

TEACHER_TAG = "distill.teacher.run_id"
"""Tag with the teacher's run: a resumed training keeps its teacher."""
MAX_AXES = 128
"""Principal axes of the teacher's features that are kept; the log gives their share of variance."""
CACHE_VERSION = 1
"""Version of the cached outputs: a change makes all teachers run again."""
PACKAGED_SIZE = 128
"""Side of the packaged teacher's input in pixels, as in the recipe efficientnet-lite0."""


def resolve_teacher(config: TrainConfig, data: PreparedData, run: tracking.Run) -> TrainConfig:
    """Return the configuration with the teacher as runs:/ID, the same whenever ``run`` resumes.

    Raises:
        DataError: the teacher was trained on another split: it may have seen this test fold.
        TrackingError: there is no such run.
    """
    if config.distill.teacher in ("none", PACKAGED):
        return config
    run_id = run.tag(TEACHER_TAG) or find_teacher(config, data)
    name = "split.fingerprint"
    teacher_split, split = tracking.get(run_id).tags.get(name), data.fingerprints[name]
    if teacher_split != split:
        raise DataError(
            f"the teacher, run {run_id}, has {name} {teacher_split}, and the data here {split}: it "
            "may have learned from tiles of this test fold; train a teacher on this split"
        )
    run.set_tags({TEACHER_TAG: run_id})
    return replace(config, distill=replace(config.distill, teacher=f"runs:/{run_id}"))


def targets(config: TrainConfig, data: PreparedData, compute: "Compute") -> "SoftTargets | None":
    """Return float32 targets with a row per tile of the pack; None without a teacher.

    A row holds the K shares of the classes and, if ``distill.features`` is set, up to `MAX_AXES`
    features. Rows outside the train fold are zero. ``config`` comes from `resolve_teacher`. The
    teacher's outputs are cached.

    Raises:
        ModelError: the teacher has other classes or bands.
        TrackingError: there is no such run.
    """
    from eurosat.evaluation import calibration

    distill = config.distill
    if distill.teacher == "none" or not (distill.share or distill.features):
        return None
    axes, logits = _cached_outputs(config, data, compute)
    rows = data.split.indices("train")
    labels = np.eye(len(data.pack.classes))[data.pack.labels[rows]]
    soft = calibration.softmax(logits / distill.temperature) if distill.share else 0
    parts = [distill.share * soft + (1 - distill.share) * labels]
    if distill.features:
        parts.append(axes)
    train_targets = np.concatenate(parts, axis=1)
    all_targets = np.zeros((len(data.pack.labels), train_targets.shape[1]), np.float32)
    all_targets[rows] = train_targets
    return all_targets


def principal_axes(features_NF: "Floats") -> "Floats":
    """Return the features (N, F) on their principal axes of largest variance, (N, `MAX_AXES`).

    There are fewer axes if F is smaller. The result is centred, and its variance over all axes is
    1. The largest component of each axis is positive, so that other machines get the same signs.
    """
    centred = features_NF - features_NF.mean(axis=0)
    variances, vectors = np.linalg.eigh(np.cov(centred, rowvar=False))
    vectors = vectors[:, ::-1][:, :MAX_AXES]
    largest = np.take_along_axis(vectors, abs(vectors).argmax(axis=0)[None], axis=0)
    axes = centred @ (vectors * np.sign(largest))
    share = variances[::-1][:MAX_AXES].sum() / max(float(variances.sum()), 1e-12)
    log.info("%d axes hold %.2f of the variance of the features", axes.shape[1], share)
    scaled: Floats = axes / max(axes.std(), 1e-12)
    return scaled


def _cached_outputs(
    config: TrainConfig, data: PreparedData, compute: "Compute"
) -> "tuple[Floats, Floats]":
    """Return principal axes and logits of the train fold, from the cache or the teacher."""
    from filelock import FileLock

    teacher, features = config.distill.teacher, bool(config.distill.features)
    if teacher != PACKAGED:
        teacher = tracking.resolve_run(teacher)
    root = config.data.cache_dir / "teachers"
    root.mkdir(parents=True, exist_ok=True)
    cache.prune_expired(root)
    versions = [CACHE_VERSION, MAX_AXES, PACKAGED_SIZE]
    inputs = [teacher, features, data.fingerprints, config.data.decode_options]
    key = [*versions, *inputs, dataclasses.asdict(compute)]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    file = root / f"{digest[:16]}.npz"
    with FileLock(f"{file}.lock"):  # several trials or ranks need the same outputs
        with contextlib.suppress(OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            with np.load(file, allow_pickle=False) as cached:
                outputs = cached["axes"], cached["logits"]
            with contextlib.suppress(OSError):  # another user's file
                file.touch()
            return outputs
        axes, logits = _run_teacher(teacher, data, compute, features=features)
        with contextlib.suppress(OSError):  # not cached: the next training runs the teacher again
            atomic.atomic_write(file, lambda opened: np.savez(opened, axes=axes, logits=logits))
    return axes, logits


def _run_teacher(
    teacher: str, data: PreparedData, compute: "Compute", *, features: bool
) -> "tuple[Floats, Floats]":
    """Return principal axes (N, 0 without ``features``) and logits of the train fold."""
    from eurosat.data.loaders import TileLoader
    from eurosat.models import predict

    net = _packaged_teacher(data) if teacher == PACKAGED else _load_teacher(teacher, data)
    net.to(compute.device, memory_format=compute.memory_format)  # type: ignore[call-overload]
    batches = TileLoader(data.pack, data.split.indices("train"))
    log.info("running the teacher, %s, on %d tiles", teacher, len(data.split.indices("train")))
    with compute.autocast():
        if not features:
            logits, _ = predict.logits(net, batches)
            return np.empty((len(logits), 0), np.float32), logits
        channels = bands.rgb_indices() if net.spec.bands < data.pack.bands else slice(None)
        (head_inputs, logits), _ = predict.run_over(
            net, batches, lambda tiles_NCHW: net.forward_with_features(tiles_NCHW[:, channels])
        )
    return principal_axes(head_inputs).astype(np.float32), logits


def find_teacher(config: TrainConfig, data: PreparedData) -> str:
    """Return the id of the run that ``distill.teacher`` names.

    Raises:
        TrackingError: there is no such run, or no finished one of that recipe on this data and
            split.
    """
    reference = config.distill.teacher
    if reference.startswith(("runs:/", "models:/")):
        return tracking.resolve_run(reference)
    tags = {"kind": "train", **data.fingerprints}
    if runs := tracking.finished_runs(config.experiment, tags, {"recipe": reference}):
        return runs[0]
    raise TrackingError(
        f"distill.teacher={reference}: experiment {config.experiment} has no finished run of that "
        f"recipe on this data and split; train it first (python -m eurosat.train "
        f"recipe={reference} ...), or give runs:/ID"
    )


def _load_teacher(run_id: str, data: PreparedData) -> "Network":
    from eurosat.models import network

    with tracking.artifact(run_id, "weights.safetensors") as file:
        teacher = network.load(file)
    spec, pack = teacher.spec, data.pack
    if (spec.classes, spec.bands) != (pack.classes, pack.bands):
        raise ModelError(
            f"the teacher, run {run_id}, has the classes {', '.join(spec.classes)} and "
            f"{spec.bands} bands; the data have {', '.join(pack.classes)} and {pack.bands} bands: "
            "set another distill.teacher"
        )
    return teacher


def _packaged_teacher(data: PreparedData) -> "Network":
    """Return EfficientNet-Lite0 with its ImageNet weights, for the colours of a tile."""
    from eurosat.models import pretrained

    if data.pack.bands not in (pretrained.RGB_BANDS, len(bands.NAMES)):
        raise ModelError(
            f"the teacher {PACKAGED} takes 3 bands (red, green, blue) or {len(bands.NAMES)}; the "
            f"data have {data.pack.bands}: set distill.teacher=none"
        )
    return pretrained.create(
        ModelConfig(name=pretrained.PACKAGED_MODEL, input_size=PACKAGED_SIZE),
        PACKAGED,
        classes=data.pack.classes,
        bands=pretrained.RGB_BANDS,
        tile_size=(PACKAGED_SIZE, PACKAGED_SIZE),
        mean=pretrained.IMAGENET_MEAN,
        std=pretrained.IMAGENET_STD,
    )
