"""Stored test predictions of a run, their metrics, and the comparison of two versions."""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eurosat import tracking
from eurosat.errors import ModelError
from eurosat.runtime.digests import sha256_of
from registry import parquet_table, versions
from registry.gates import Gates
from registry.metric_gates import PairedCounts

if TYPE_CHECKING:
    import pandas as pd

    from eurosat.data.arrays import Floats, Labels

PREDICTIONS = "predictions.parquet"
SPLIT = "split.csv"
TRAINING_FOLDS = ("train", "val")
MAX_FILE_MB = 200
"""Size of a table that is downloaded; a split of a million tiles has some 120 MB."""
TILE = "tile"
"""Column with a tile's path; older tables lack it."""
TILE_KEY = ("sha256", "label")
"""Columns that identify a test tile: its content and its label."""
RECALL, RECALL_DROP, WORST_RECALL = "recall/", "recall_drop", "worst_recall"
PROBABILITY_PREFIX = "p/"
"""Precedes a class's name in the columns of probabilities."""
MIN_COMMON_TILES, MIN_COMMON_SHARE = 500, 0.9
"""Common test tiles that are enough for a comparison. With 500 tiles the standard error of an
accuracy of 0.95 is one percentage point; the share is for small test folds."""
FIXED_LIMITS_ONLY = "only the fixed limits apply"


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """A table of predictions, one row per tile."""

    frame: "pd.DataFrame"
    """Columns sha256, label and one ``p/Class`` per class."""
    sha256: str = ""
    """Digest of the file that was read."""

    @property
    def classes(self) -> list[str]:
        columns = map(str, self.frame.columns)
        return [
            name.removeprefix(PROBABILITY_PREFIX)
            for name in columns
            if name.startswith(PROBABILITY_PREFIX)
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvidenceComparison:
    """Metrics of a candidate and of the champion on the same test tiles."""

    candidate: Mapping[str, float]
    champion: Mapping[str, float] | None
    """None if only the fixed limits apply."""
    paired: PairedCounts | None = None
    notes: tuple[str, ...] = ()
    refusal: str = ""
    """Why the two cannot be compared, and what to do; empty if they can."""


def read(
    run_id: str,
    name: str = PREDICTIONS,
    key: Sequence[str] = TILE_KEY,
    remedy: str = "train again",
) -> Predictions:
    """Read a run's predictions of its test fold, or another table with the columns ``key``.

    Raises:
        TrackingError: the run has none.
        ModelError: the table is too large, lacks a column, is empty, or has a label without
            probabilities.
    """
    columns = (TILE, *key)
    with small_artifact(run_id, name, remedy) as file:
        try:
            frame = parquet_table.read(file, columns, PROBABILITY_PREFIX)
            sha256 = sha256_of(file)
        except parquet_table.TableTooLarge as error:
            raise ModelError(f"{name} of run {run_id} {error}: {remedy}") from error
        except (ValueError, OSError) as error:  # pyarrow's errors are ValueErrors
            raise ModelError(
                f"{name} of run {run_id} is not a Parquet table of predictions: {remedy}"
            ) from error
    predictions = Predictions(frame=frame, sha256=sha256)
    missing = [column for column in key if column not in frame]
    if missing or not predictions.classes or frame.empty:
        raise ModelError(
            f"{name} of run {run_id} has {len(frame)} rows and {len(predictions.classes)} columns "
            f"{PROBABILITY_PREFIX}Class, and lacks {', '.join(missing) or 'nothing else'}: {remedy}"
        )
    unknown = sorted(set(frame["label"].astype(str)) - set(predictions.classes))
    if unknown:
        raise ModelError(
            f"{name} of run {run_id} has labels without probabilities, such as {unknown[0]}: "
            f"{remedy}"
        )
    return predictions


@contextmanager
def small_artifact(run_id: str, name: str, remedy: str) -> Iterator[Path]:
    """Download an artifact for the duration of the block, unless it is too large.

    Raises:
        TrackingError: the run has no such artifact.
        ModelError: it has more than MAX_FILE_MB.
    """
    size_mb = versions.artifact_sizes(run_id).get(name, 0) / 1e6
    if size_mb > MAX_FILE_MB:
        raise ModelError(
            f"{name} of run {run_id} has {size_mb:.0f} MB, over {MAX_FILE_MB} MB: {remedy}"
        )
    with tracking.artifact(run_id, name) as file:
        yield file


def training_tiles(run_id: str) -> set[str]:
    """Return the sha256 of the tiles that a run used to train or to choose its weights.

    Raises:
        TrackingError: the run has no split.
        ModelError: the split does not have the form that training writes.
    """
    import pandas as pd

    with small_artifact(run_id, SPLIT, "train again") as file:
        try:
            table = pd.read_csv(file, dtype=str, usecols=["sha256", "fold"])
        except (ValueError, OSError) as error:
            raise ModelError(
                f"{SPLIT} of run {run_id} is not a table of tiles ({error}): train again"
            ) from error
    return set(table.loc[table["fold"].isin(TRAINING_FOLDS), "sha256"])


def digest(sources: Sequence[Predictions], gates: Gates) -> str:
    """Return the sha256 of what a verdict is based on: the files of predictions, and the gates."""
    basis = [[predictions.sha256 for predictions in sources], dataclasses.asdict(gates)]
    return hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()


def metrics(predictions: Predictions) -> dict[str, float]:
    """Return the metrics of ``eurosat.evaluation.metrics.evaluate``, and the worst class's recall.

    Empty if a probability is not a number in [0, 1].
    """
    from eurosat.evaluation.metrics import evaluate

    if (arrays := to_arrays(predictions)) is None:
        return {}
    values = evaluate(*arrays, predictions.classes)
    recalls = [value for name, value in values.items() if name.startswith(RECALL)]
    return values | {WORST_RECALL: min(recalls)}


def metric_intervals(predictions: Predictions, resamples: int) -> dict[str, tuple[float, float]]:
    """Return 95 % bootstrap intervals of the metrics; empty as those are."""
    from eurosat.evaluation.metrics import intervals

    if (arrays := to_arrays(predictions)) is None:
        return {}
    return intervals(*arrays, predictions.classes, resamples=resamples)


def to_arrays(predictions: Predictions) -> "tuple[Labels, Floats] | None":
    """Return (N,) labels and (N, K) probabilities, or None if these are not all in [0, 1]."""
    import numpy as np

    classes = predictions.classes
    columns = [PROBABILITY_PREFIX + name for name in classes]
    probabilities = predictions.frame[columns].to_numpy(np.float64)
    if not ((probabilities >= 0) & (probabilities <= 1)).all():  # refuses NaN too
        return None
    index = {name: k for k, name in enumerate(classes)}
    labels = np.array([index[name] for name in predictions.frame["label"]], np.int64)
    return labels, probabilities


def compare(
    candidate: Predictions,
    champion: Predictions | None,
    excluded: Collection[str] = (),
    *,
    accept_new_data: bool = False,
) -> EvidenceComparison:
    """Return the metrics of both on the test tiles (same content, same label) that they share.

    ``excluded`` holds the sha256 of tiles that one of them was trained with.
    """
    if champion is None:
        note = f"there is no champion yet: {FIXED_LIMITS_ONLY}"
        return EvidenceComparison(candidate=metrics(candidate), champion=None, notes=(note,))
    common_candidate, common_champion = common_tiles(candidate, champion, excluded)
    common = len(common_candidate.frame)
    total = max(len(candidate.frame), len(champion.frame))
    if common >= min(MIN_COMMON_TILES, MIN_COMMON_SHARE * total):
        notes = () if common == total else (f"compared on the {common} test tiles in common",)
        return _compare_common(common_candidate, common_champion, notes)
    overlap = (
        "the test tiles are not the champion's"
        if common == 0
        else f"only {common} of {total} test tiles are also the champion's"
    )
    if accept_new_data:
        note = f"{overlap}, which was accepted: {FIXED_LIMITS_ONLY}"
        return EvidenceComparison(candidate=metrics(candidate), champion=None, notes=(note,))
    refusal = (
        f"{overlap}, so the two cannot be compared: to apply only the fixed limits, pass "
        "--accept-new-data; to give other data a model of their own, use --model NAME"
    )
    return EvidenceComparison(candidate=metrics(candidate), champion=None, refusal=refusal)


def _compare_common(
    candidate: Predictions, champion: Predictions, notes: tuple[str, ...]
) -> EvidenceComparison:
    candidate_metrics, champion_metrics = metrics(candidate), metrics(champion)
    paired = None
    candidate_arrays, champion_arrays = to_arrays(candidate), to_arrays(champion)
    if candidate_arrays is not None and champion_arrays is not None:
        candidate_right, champion_right = (
            probabilities.argmax(axis=1) == labels
            for labels, probabilities in (candidate_arrays, champion_arrays)
        )
        paired = PairedCounts(
            tiles=len(candidate_right),
            only_candidate=int((candidate_right & ~champion_right).sum()),
            only_champion=int((champion_right & ~candidate_right).sum()),
        )
        drops = [
            value - candidate_metrics.get(name, 0.0)
            for name, value in champion_metrics.items()
            if name.startswith(RECALL)
        ]
        candidate_metrics[RECALL_DROP] = max(drops)
    return EvidenceComparison(
        candidate=candidate_metrics, champion=champion_metrics, paired=paired, notes=notes
    )


def common_tiles(
    first: Predictions,
    second: Predictions,
    excluded: Collection[str] = (),
    columns: Sequence[str] = TILE_KEY,
) -> tuple[Predictions, Predictions]:
    """Return the rows of each with equal ``columns``; duplicates pair in the order of the tables.

    ``excluded`` holds the sha256 of tiles to leave out.
    """
    keyed = []
    for table in (first.frame, second.frame):
        frame = table[~table["sha256"].isin(excluded)]
        key = [frame[name].astype(str) for name in columns]
        nth = frame.groupby([series.to_numpy() for series in key]).cumcount()
        keyed.append(frame.set_index([*key, nth]))
    common = keyed[0].index.intersection(keyed[1].index)
    first, second = (Predictions(frame=frame.loc[common].reset_index(drop=True)) for frame in keyed)
    return first, second
