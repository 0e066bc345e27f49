"""What is known of a version, from what its run and its registration have stored."""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eurosat import tracking
from eurosat.errors import ModelError
from registry.gates import Gates, Paired

if TYPE_CHECKING:
    import pandas as pd

    from eurosat.data.arrays import Floats, Labels

PREDICTIONS = "predictions.parquet"
SPLIT = "split.csv"
LEARNED = ("train", "val")
TILE = ("sha256", "label")
"""Columns that a test tile is known by: its content, and what it was called."""
RECALL, DROP = "recall/", "recall_drop"
PREFIX = "p/"
"""Before a class's name in the columns of probabilities."""
ENOUGH_TILES, ENOUGH_SHARE = 500, 0.9
"""Common test tiles that make a comparison: at 500, the standard error of an accuracy of 0.95 is
one percentage point; the share is for small test folds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """A test fold: one row per tile."""

    frame: "pd.DataFrame"
    """Columns sha256, label and one ``p/Class`` per class."""
    sha256: str = ""
    """Of the file that it was read from."""

    @property
    def classes(self) -> list[str]:
        columns = map(str, self.frame.columns)
        return [name.removeprefix(PREFIX) for name in columns if name.startswith(PREFIX)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    candidate: Mapping[str, float]
    champion: Mapping[str, float] | None
    """None where the bounds alone judge."""
    paired: Paired | None = None
    notes: tuple[str, ...] = ()
    refusal: str = ""


def read(
    run_id: str, name: str = PREDICTIONS, tile: Sequence[str] = TILE, remedy: str = "train again"
) -> Predictions:
    """A run's predictions, of its test fold or of another table with the columns ``tile``.

    Raises:
        TrackingError: the run has none.
        ModelError: the table lacks a column, is empty, or names a class that it has no column for.
    """
    import pandas as pd

    with tracking.artifact(run_id, name) as file:
        try:
            sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
            predictions = Predictions(frame=pd.read_parquet(file), sha256=sha256)
        except (ValueError, OSError) as error:  # pyarrow's errors are ValueErrors
            raise ModelError(f"{name} of run {run_id} is no Parquet file: {remedy}") from error
    frame = predictions.frame
    lacking = [column for column in tile if column not in frame]
    if lacking or not predictions.classes or frame.empty:
        raise ModelError(
            f"{name} of run {run_id} has {len(frame)} rows and {len(predictions.classes)} columns "
            f"{PREFIX}Class, and lacks {', '.join(lacking) or 'nothing else'}: {remedy}"
        )
    strangers = sorted(set(frame["label"].astype(str)) - set(predictions.classes))
    if strangers:
        raise ModelError(f"{name} of run {run_id} has labels without probabilities: {strangers[0]}")
    return predictions


def learned_from(run_id: str) -> set[str]:
    """sha256 of the tiles that a run has learned from, or chosen its weights by.

    Raises:
        TrackingError: the run has no split.
        ModelError: the split is not what training writes.
    """
    import pandas as pd

    with tracking.artifact(run_id, SPLIT) as file:
        try:
            table = pd.read_csv(file, dtype=str, usecols=["sha256", "fold"])
        except (ValueError, OSError) as error:
            raise ModelError(f"{SPLIT} of run {run_id} is no table of tiles: {error}") from error
    return set(table.loc[table["fold"].isin(LEARNED), "sha256"])


def digest(judged: Sequence[Predictions], bars: Gates) -> str:
    """sha256 of what a verdict rests on: the files of predictions, and the gates."""
    told = [[one.sha256 for one in judged], dataclasses.asdict(bars)]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def figures(predictions: Predictions) -> dict[str, float]:
    """As ``eurosat.evaluation.metrics.evaluate``, and the recall of the class that fares worst.

    Empty where a probability is not a number in [0, 1].
    """
    from eurosat.evaluation.metrics import evaluate

    if (found := arrays(predictions)) is None:
        return {}
    told = evaluate(*found, predictions.classes)
    return told | {"worst_recall": min(v for k, v in told.items() if k.startswith(RECALL))}


def intervals(predictions: Predictions, resamples: int) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals of the figures; empty as they are."""
    from eurosat.evaluation import metrics

    if (found := arrays(predictions)) is None:
        return {}
    return metrics.intervals(*found, predictions.classes, resamples=resamples)


def arrays(predictions: Predictions) -> "tuple[Labels, Floats] | None":
    """(N,) labels and (N, K) probabilities, if those are numbers in [0, 1]."""
    import numpy as np

    classes = predictions.classes
    probabilities = predictions.frame[[PREFIX + name for name in classes]].to_numpy(np.float64)
    if not ((probabilities >= 0) & (probabilities <= 1)).all():  # NaN is neither
        return None
    index = {name: k for k, name in enumerate(classes)}
    labels = np.array([index[name] for name in predictions.frame["label"]], np.int64)
    return labels, probabilities


def compare(
    candidate: Predictions,
    champion: Predictions | None,
    known: Collection[str] = (),
    *,
    accept_new_data: bool = False,
) -> Comparison:
    """Figures of both on the tiles (same content, same label) that both were tested on.

    Without the ``known``, the sha256 of tiles that one of them has learned from.
    """
    if champion is None:
        note = "there is no champion yet: the bounds alone judge"
        return Comparison(candidate=alone(candidate), champion=None, notes=(note,))
    ours, theirs = in_common(candidate, champion, known)
    common, total = len(ours.frame), max(len(candidate.frame), len(champion.frame))
    if common >= min(ENOUGH_TILES, ENOUGH_SHARE * total):
        notes = () if common == total else (f"compared on the {common} test tiles in common",)
        return _side_by_side(ours, theirs, notes)
    few = (
        "the test tiles are others than the champion's"
        if common == 0
        else f"only {common} of {total} test tiles are the champion's too"
    )
    if accept_new_data:
        note = f"{few}, which was accepted: the bounds alone judge"
        return Comparison(candidate=alone(candidate), champion=None, notes=(note,))
    refusal = f"{few}, so the two do not compare: --accept-new-data lets the bounds alone judge"
    return Comparison(candidate=alone(candidate), champion=None, refusal=refusal)


def alone(candidate: Predictions) -> dict[str, float]:
    """Its figures; against nobody, no recall has dropped."""
    found = figures(candidate)
    return found | {DROP: 0.0} if found else {}


def _side_by_side(ours: Predictions, theirs: Predictions, notes: tuple[str, ...]) -> Comparison:
    mine, yours = figures(ours), figures(theirs)
    one, other = arrays(ours), arrays(theirs)
    paired = None
    if one is not None and other is not None:
        right, champions_right = (
            probabilities.argmax(axis=1) == labels for labels, probabilities in (one, other)
        )
        paired = Paired(
            tiles=len(right),
            only_candidate=int((right & ~champions_right).sum()),
            only_champion=int((champions_right & ~right).sum()),
        )
        drops = [yours[k] - mine.get(k, 0.0) for k in yours if k.startswith(RECALL)]
        mine[DROP] = max(drops)
    return Comparison(candidate=mine, champion=yours, paired=paired, notes=notes)


def in_common(
    one: Predictions,
    other: Predictions,
    known: Collection[str] = (),
    columns: Sequence[str] = TILE,
) -> tuple[Predictions, Predictions]:
    """The rows of each that pair up; equal tiles pair in the order in which they stand."""
    keyed = []
    for whole in (one.frame, other.frame):
        frame = whole[~whole["sha256"].isin(known)]
        tile = [frame[name].astype(str) for name in columns]
        nth = frame.groupby([series.to_numpy() for series in tile]).cumcount()
        keyed.append(frame.set_index([*tile, nth]))
    common = keyed[0].index.intersection(keyed[1].index)
    mine, yours = (Predictions(frame=frame.loc[common].reset_index(drop=True)) for frame in keyed)
    return mine, yours
