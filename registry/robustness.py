"""How a version answers tiles under haze, blur, noise and others, asked at registration."""

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
"""Of the run's artifacts: a row for each tile under each kind."""
SEVERITY = 1
"""Of `eurosat.evaluation.corruptions`: as a next scene may well be. Above it some kinds leave so
little of a tile that all networks fail alike: on EuroSAT's tiles with noise `efficientnet-lite0` in
INT8 has an accuracy of 0.64 at severity 1, 0.23 at 2 and 0.12 at 3."""
TILES = 250
"""Of the test fold: 2,000 answers of one view, seconds for a network of a few hundred images/s."""
ENOUGH = 100
"""Tiles in common that compare two versions; or nine tenths of them, for small test folds."""
ROW = (*evidence.TILE, "kind")


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A version's answers, or why there are none that count."""

    predictions: Predictions | None = None
    fault: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    candidate: float | None = None
    """Mean over kinds of the accuracy; of two, on the tiles that both were asked about."""
    champion: float | None = None
    fault: str = ""
    """Why one of the two is missing, and what to do."""
    judged: tuple[Predictions, ...] = ()


def ensure(run_id: str) -> bool:
    """Ask the run's network, unless that was done; whether it was now.

    Where the tiles are not on this machine, that is told in one line, and nothing is kept.
    """
    if not read(run_id).fault:
        return False
    try:
        asked = ask(run_id)
    except (ConfigError, DataError, StorageError) as error:
        log.warning(
            "corrupted tiles were not tried (%s): the gate %s refuses, until %s",
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
        asked.to_parquet(file, index=False)
        versions.client().log_artifact(run_id, str(file))
    return True


def ask(run_id: str) -> "pd.DataFrame":
    """Answers of the network that is served, in one view, about tiles of the run's test fold.

    A row for each tile and kind: tile, sha256, label, kind, severity, and ``p/Class`` per class.

    Raises:
        DataError: the tiles are not here, or are no longer those of the run.
        ConfigError: the run does not say from where they are.
    """
    import numpy as np
    import pandas as pd

    from eurosat.evaluation import corruptions
    from eurosat.evaluation.recorded import recorded_fold
    from eurosat.models import onnx_session

    pack, rows = recorded_fold(run_id, "test")
    rows = rows[chosen(pack.table["sha256"].iloc[rows])]
    tiles_NHWC = pack.tiles_NHWC[rows]
    seen = [corruptions.corrupt(tiles_NHWC, kind, SEVERITY) for kind in corruptions.KINDS]
    held, fast = versions.held(run_id), versions.NETWORK_INT8
    with tracking.artifact(run_id, fast if fast in held else versions.NETWORK) as file:
        answers_NK = onnx_session.probabilities(file, np.concatenate(seen), one_view=True)
    kinds, of_tiles = len(corruptions.KINDS), pack.table.iloc[rows]
    frame = pd.DataFrame(
        {
            "tile": np.tile(of_tiles["path"], kinds),
            "sha256": np.tile(of_tiles["sha256"], kinds),
            "label": np.tile([pack.classes[k] for k in pack.labels[rows]], kinds),
            "kind": np.repeat(list(corruptions.KINDS), len(rows)),
            "severity": SEVERITY,
        }
    )
    for k, name in enumerate(pack.classes):
        frame[evidence.PREFIX + name] = answers_NK[:, k]
    return frame


def chosen(sha256s: "pd.Series[str]") -> "npt.NDArray[np.int64]":
    """Positions of the tiles that are asked about: by content, so that equal folds give equal ones.

    A digest's order is as good as a draw, and folds that overlap share the most.
    """
    positions: npt.NDArray[np.int64] = sha256s.to_numpy().argsort(kind="stable")[:TILES]
    return positions


def read(run_id: str) -> Asked:
    """What registration left with the run.

    Raises:
        TrackingError: the run or its artifacts cannot be reached.
    """
    from eurosat.evaluation import corruptions

    if FILE not in versions.held(run_id):
        return Asked(fault=f"run {run_id} has no {FILE}")
    try:
        predictions = evidence.read(run_id, FILE, (*ROW, "severity"), "it counts for nothing")
    except ModelError as error:
        return Asked(fault=str(error))
    frame = predictions.frame
    if set(frame["kind"]) != set(corruptions.KINDS) or set(frame["severity"]) != {SEVERITY}:
        return Asked(fault=f"{FILE} of run {run_id} is of other kinds or severities than now")
    return Asked(predictions=predictions)


def compare(run_id: str, champion: str | None, known: Collection[str] = ()) -> Comparison:
    """Figures of one run or two, without the ``known``, the sha256 of what they learned from."""
    asked = {run: read(run) for run in (run_id, champion) if run}
    judged = tuple(one.predictions for one in asked.values() if one.predictions)
    mine = asked[run_id].predictions
    theirs = asked[champion].predictions if champion else None
    faults = [f"{one.fault}: {remedy(run)}" for run, one in asked.items() if one.fault]
    if mine and theirs:
        fewer = min(len(set(one.frame["sha256"])) for one in (mine, theirs))
        ours, theirs = evidence.in_common(mine, theirs, known, ROW)
        common = len(set(ours.frame["sha256"]))
        if common < min(ENOUGH, evidence.ENOUGH_SHARE * fewer):
            faults.append(
                f"only {common} of {fewer} corrupted tiles are the champion's too: a file of gates "
                f"with alone = true in [{GATE}] lets its floor alone judge"
            )
            theirs = None
        else:
            mine = ours
    return Comparison(
        candidate=accuracy(mine) if mine else None,
        champion=accuracy(theirs) if theirs else None,
        fault="; ".join(faults),
        judged=judged,
    )


def remedy(run_id: str) -> str:
    return f"`python -m registry.register {run_id}` asks it, where its tiles are"


def accuracy(predictions: Predictions) -> float:
    """Mean over kinds; NaN where a probability is not a number in [0, 1]."""
    rows = by_kind(predictions)
    return sum(row[1] for row in rows) / len(rows) if rows else math.nan


def by_kind(predictions: Predictions) -> list[tuple[str, float, float]]:
    """Kind, accuracy and mean confidence; empty where probabilities are none."""
    if (arrays := evidence.arrays(predictions)) is None:
        return []
    labels, probabilities = arrays
    right, confidence = probabilities.argmax(axis=1) == labels, probabilities.max(axis=1)
    kinds = predictions.frame["kind"].to_numpy()
    return [
        (str(kind), float(right[kinds == kind].mean()), float(confidence[kinds == kind].mean()))
        for kind in dict.fromkeys(kinds)
    ]
