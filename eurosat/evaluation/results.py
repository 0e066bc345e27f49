"""What a network answers on a fold, compared and under corruptions."""

import logging
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from eurosat import tracking
from eurosat.config import compose
from eurosat.data.arrays import Floats, Labels
from eurosat.data.loaders import TileLoader
from eurosat.data.pack import Pack, open_pack
from eurosat.errors import DataError
from eurosat.evaluation import calibration, corruptions, metrics
from eurosat.evaluation.calibration import Calibration, softmax
from eurosat.evaluation.recorded import recorded_fold, recorded_network
from eurosat.models import predict
from eurosat.models.network import Network
from eurosat.runtime.progress import track

log = logging.getLogger(__name__)

ALL_TILES = "all"
"""The fold of other data: every tile that the run did not learn from."""
MAX_WORST = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """A network's answers on a fold."""

    run_id: str
    fold: str
    network: "Network"
    calibration: "Calibration"
    pack: "Pack"
    rows: "npt.NDArray[np.int64]"
    """Of the pack's tiles."""
    logits: "Floats"
    """Before calibration."""
    labels: "Labels"

    @property
    def probabilities(self) -> "Floats":
        return softmax(self.logits / self.calibration.temperature)

    @property
    def tiles(self) -> list[str]:
        return list(self.pack.table["path"].iloc[self.rows])


class TileBatch(NamedTuple):
    """Tiles that are not in a pack."""

    tiles_NHWC: "npt.NDArray[np.uint8]"
    labels: "Labels"


def unseen_tiles(run_id: str, network: "Network", data: str) -> tuple["Pack", Any]:
    """The tiles of another data set that the run neither learned from nor was chosen by.

    Raises:
        DataError: classes, bands or size are not those of the network, or no tile is left.
    """
    pack = open_pack(compose([one if "=" in one else f"data={one}" for one in data.split()]).data)
    spec = network.spec
    shape = (*spec.tile_size, spec.bands)
    if pack.classes != spec.classes or pack.tiles_NHWC.shape[1:] != shape:
        raise DataError(
            f"--data {data} has classes {', '.join(pack.classes)} and tiles of "
            f"{pack.tiles_NHWC.shape[1:]}; the network knows {', '.join(spec.classes)} and {shape}"
        )
    with tracking.artifact(run_id, "split.csv") as file:
        seen = pd.read_csv(file)
    seen = seen[seen["fold"] != "test"]
    rows = np.flatnonzero(~pack.table["sha256"].isin(set(seen["sha256"])))
    log.info("%d of %d tiles were not seen in training", len(rows), len(pack.table))
    if not len(rows):
        raise DataError(f"--data {data}: the run has seen every tile of it; take another data set")
    return pack, rows


def evaluate(run_id: str, fold: str = "test", data: str | None = None) -> EvaluationResult:
    """Answers of the run's weights on a fold of its own data, or on ``data``.

    Raises:
        DataError: see `recorded_fold` and `unseen_tiles`.
    """
    net, calibration = recorded_network(run_id)
    pack, rows = unseen_tiles(run_id, net, data) if data else recorded_fold(run_id, fold)
    logits, labels = predict.logits(net, TileLoader(pack, rows))
    return EvaluationResult(
        run_id=run_id,
        fold=ALL_TILES if data else fold,
        network=net,
        calibration=calibration,
        pack=pack,
        rows=rows,
        logits=logits,
        labels=labels,
    )


def evaluate_corrupted(result: EvaluationResult, max_tiles: int) -> list[dict[str, Any]]:
    """Accuracy, mean confidence and share told unlike, by kind and severity (0: untouched)."""
    rng = np.random.default_rng(0)
    rows = np.sort(rng.choice(result.rows, min(max_tiles, len(result.rows)), replace=False))
    tiles, labels = result.pack.tiles_NHWC[rows], result.pack.labels[rows]
    steps = [("none", 0)]
    steps += [(kind, one) for kind in corruptions.KINDS for one in corruptions.SEVERITIES]
    table = []
    for kind, severity in track(steps, len(steps), "corruptions", "passes"):
        seen = corruptions.corrupt(tiles, kind, severity) if severity else tiles
        batches = TileLoader(TileBatch(seen, labels), np.arange(len(seen)))
        logits, _ = predict.logits(result.network, batches)
        probabilities = calibration.softmax(logits / result.calibration.temperature)
        unlike = calibration.energy(logits) > result.calibration.ood_threshold
        table.append(
            {
                "kind": kind,
                "severity": severity,
                "tiles": len(rows),
                "accuracy": float((probabilities.argmax(axis=1) == labels).mean()),
                "confidence": float(probabilities.max(axis=1).mean()),
                "unlike": float(unlike.mean()),
            }
        )
    return table


def compare(result: EvaluationResult, other: EvaluationResult) -> dict[str, Any]:
    """``judged`` against ``other`` on the same tiles.

    Raises:
        DataError: they were not judged on the same tiles.
    """
    if result.tiles != other.tiles or result.pack.fingerprint != other.pack.fingerprint:
        raise DataError(
            f"runs {result.run_id} and {other.run_id} have other {result.fold} folds: "
            "compare runs of one data set, protocol and split seed"
        )
    found = metrics.compare(
        result.labels, result.probabilities, other.probabilities, result.pack.classes
    )
    return {"run": other.run_id} | asdict(found)
