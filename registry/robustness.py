"""Predictions for corrupted test tiles (haze, blur, noise and others), made at registration."""

import logging
import math
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eurosat import tracking
from eurosat.errors import ConfigError, DataError, ModelError, StorageError
from registry import evidence, versions
from registry.evidence import Predictions

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd

log = logging.getLogger(__name__)

GATE = "robustness"
FILE = "corruptions.parquet"
"""Artifact of the run: one row per tile and kind of corruption."""
SEVERITY = 1
"""Severity in `eurosat.evaluation.corruptions`: as the next scene may well be. Higher ones leave so
little of a tile that all networks fail alike: on EuroSAT's tiles with noise `efficientnet-lite0` in
INT8 has an accuracy of 0.64 at severity 1, 0.23 at 2 and 0.12 at 3."""
TILES = 250
"""Test tiles that are corrupted: with 8 kinds 2,000 predictions of one view, seconds for a network
of a few hundred tiles/s."""
MIN_COMMON_TILES = 100
"""Common tiles that are enough to compare two versions; or nine tenths of them, for small folds."""
ROW_KEY = (*evidence.TILE_KEY, "kind")


@dataclass(frozen=True, kw_only=True, slots=True)
class CorruptionResult:
    """A version's predictions for corrupted tiles, or why there are none."""

    predictions: Predictions | None = None
    fault: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RobustnessComparison:
    """Accuracies of one or two versions under corruptions."""

    candidate: float | None = None
    """Mean over kinds of the accuracy; with a champion, on the tiles that both have predicted."""
    champion: float | None = None
    fault: str = ""
    """Why one of the two is missing, and what to do."""
    sources: tuple[Predictions, ...] = ()
    """All predictions that were read."""


def ensure_predicted(run_id: str) -> bool:
    """Predict corrupted tiles unless the run has such predictions; return whether it did.

    If the tiles are not on this machine, one warning says so, and nothing is stored.
    """
    if not read(run_id).fault:
        return False
    try:
        frame = predict_corrupted(run_id)
    except (ConfigError, DataError, StorageError) as error:
        log.warning(
            "corrupted tiles were not predicted (%s): the gate %s refuses until you %s",
            error,
            GATE,
            remedy(run_id),
        )
        return False
    with (
        tempfile.TemporaryDirectory() as folder,
        tracking.translate_errors(f"{FILE} of run {run_id}"),
    ):
        file = Path(folder) / FILE
        frame.to_parquet(file, index=False)
        versions.client().log_artifact(run_id, str(file))
    return True


def predict_corrupted(run_id: str) -> "pd.DataFrame":
    """Return predictions of the served network, with one view, for tiles of the run's test fold.

    One row per tile and kind: tile, sha256, label, kind, severity, and ``p/Class`` per class.

    Raises:
        DataError: the tiles are not on this machine, or have changed since the run.
        ConfigError: the run does not record where its tiles are.
    """
    import numpy as np
    import pandas as pd

    from eurosat.evaluation import corruptions
    from eurosat.evaluation.recorded import recorded_fold
    from eurosat.models import onnx_session

    pack, rows = recorded_fold(run_id, "test")
    rows = rows[select_tiles(pack.table["sha256"].iloc[rows])]
    tiles_NHWC = pack.tiles_NHWC[rows]
    corrupted = [corruptions.corrupt(tiles_NHWC, kind, SEVERITY) for kind in corruptions.KINDS]
    has_int8 = versions.NETWORK_INT8 in versions.artifact_names(run_id)
    served = versions.NETWORK_INT8 if has_int8 else versions.NETWORK
    with tracking.artifact(run_id, served) as file:
        probabilities_NK = onnx_session.probabilities(
            file, np.concatenate(corrupted), one_view=True
        )
    kinds, table = len(corruptions.KINDS), pack.table.iloc[rows]
    frame = pd.DataFrame(
        {
            "tile": np.tile(table["path"], kinds),
            "sha256": np.tile(table["sha256"], kinds),
            "label": np.tile([pack.classes[k] for k in pack.labels[rows]], kinds),
            "kind": np.repeat(list(corruptions.KINDS), len(rows)),
            "severity": SEVERITY,
        }
    )
    for k, name in enumerate(pack.classes):
        frame[evidence.PROBABILITY_PREFIX + name] = probabilities_NK[:, k]
    return frame


def select_tiles(sha256s: "pd.Series[str]") -> "npt.NDArray[np.int64]":
    """Return the positions of the TILES tiles with the lowest sha256.

    Equal folds give equal tiles, and folds that overlap share as many as possible.
    """
    positions: npt.NDArray[np.int64] = sha256s.to_numpy().argsort(kind="stable")[:TILES]
    return positions


def read(run_id: str) -> CorruptionResult:
    """Read the predictions that registration stored with the run.

    Raises:
        TrackingError: the run or its artifacts cannot be reached.
    """
    from eurosat.evaluation import corruptions

    if FILE not in versions.artifact_names(run_id):
        return CorruptionResult(fault=f"run {run_id} has no {FILE}")
    try:
        predictions = evidence.read(run_id, FILE, (*ROW_KEY, "severity"), "the file is ignored")
    except ModelError as error:
        return CorruptionResult(fault=str(error))
    frame = predictions.frame
    if set(frame["kind"]) != set(corruptions.KINDS) or set(frame["severity"]) != {SEVERITY}:
        fault = (
            f"{FILE} of run {run_id} has other kinds or severities than this version of the code"
        )
        return CorruptionResult(fault=fault)
    return CorruptionResult(predictions=predictions)


def compare(
    run_id: str, champion: str | None, excluded: Collection[str] = ()
) -> RobustnessComparison:
    """Return the mean accuracies of one run, or of two on their common tiles.

    ``excluded`` holds the sha256 of tiles that one of them was trained with.
    """
    results = {run: read(run) for run in (run_id, champion) if run}
    sources = tuple(result.predictions for result in results.values() if result.predictions)
    faults = [f"{result.fault}: {remedy(run)}" for run, result in results.items() if result.fault]
    candidates = results[run_id].predictions
    champions = results[champion].predictions if champion else None
    if candidates and champions:
        total = min(_count_tiles(candidates), _count_tiles(champions))
        common, champions = evidence.common_tiles(candidates, champions, excluded, ROW_KEY)
        shared = _count_tiles(common)
        if shared < min(MIN_COMMON_TILES, evidence.MIN_COMMON_SHARE * total):
            faults.append(
                f"only {shared} of {total} corrupted tiles are also the champion's: to apply only "
                f"the floor, set absolute_only = true in [{GATE}] of a gates file, and pass it as "
                "--gates FILE"
            )
            champions = None
        else:
            candidates = common
    return RobustnessComparison(
        candidate=mean_accuracy(candidates) if candidates else None,
        champion=mean_accuracy(champions) if champions else None,
        fault="; ".join(faults),
        sources=sources,
    )


def _count_tiles(predictions: Predictions) -> int:
    return int(predictions.frame["sha256"].nunique())


def remedy(run_id: str) -> str:
    return f"run `python -m registry.register {run_id}` on a machine with its tiles"


def mean_accuracy(predictions: Predictions) -> float:
    """Return the mean over kinds; NaN if a probability is not a number in [0, 1]."""
    rows = by_kind(predictions)
    return sum(accuracy for _, accuracy, _ in rows) / len(rows) if rows else math.nan


def by_kind(predictions: Predictions) -> list[tuple[str, float, float]]:
    """Return kind, accuracy and mean confidence; empty if probabilities are not in [0, 1]."""
    if (arrays := evidence.to_arrays(predictions)) is None:
        return []
    labels, probabilities = arrays
    right, confidence = probabilities.argmax(axis=1) == labels, probabilities.max(axis=1)
    kinds = predictions.frame["kind"].to_numpy()
    return [
        (str(kind), float(right[kinds == kind].mean()), float(confidence[kinds == kind].mean()))
        for kind in dict.fromkeys(kinds)
    ]
