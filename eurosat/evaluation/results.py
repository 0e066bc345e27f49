"""Evaluate a network on a fold or on other data, compare two, and try corrupted tiles."""

import itertools
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
"""Name of the fold of other data: every tile that the run did not train on."""
MAX_WORST = 20
"""Tiles with the highest loss in a report."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """A network's predictions on a fold."""

    run_id: str
    fold: str
    network: Network
    calibration: Calibration
    pack: Pack
    rows: npt.NDArray[np.int64]
    """Row of each tile in the pack."""
    logits: Floats
    """(N, K), before calibration."""
    labels: Labels

    @property
    def probabilities(self) -> Floats:
        """Calibrated probabilities, (N, K)."""
        return softmax(self.logits / self.calibration.temperature)

    @property
    def tiles(self) -> list[str]:
        """Name of each tile, Class/file."""
        return list(self.pack.table["path"].iloc[self.rows])


class TileBatch(NamedTuple):
    """Tiles outside a pack, such as corrupted ones."""

    tiles_NHWC: npt.NDArray[np.uint8]
    labels: Labels


def unseen_tiles(run_id: str, network: Network, data: str) -> tuple[Pack, npt.NDArray[np.int64]]:
    """Return another data set, and the rows that the run did not train or validate on.

    ``data`` is the name of a data recipe, settings such as ``data.root=DIR``, or both.

    Raises:
        DataError: classes, bands or size are not those of the network, or every tile was seen.
    """
    words = [word if "=" in word else f"data={word}" for word in data.split()]
    pack = open_pack(compose(words).data)
    spec = network.spec
    shape = (*spec.tile_size, spec.bands)
    if pack.classes != spec.classes or pack.tiles_NHWC.shape[1:] != shape:
        raise DataError(
            f"--data {data} has the classes {', '.join(pack.classes)} and tiles of "
            f"{pack.tiles_NHWC.shape[1:]}; the network needs {', '.join(spec.classes)} and {shape}"
        )
    with tracking.artifact(run_id, "split.csv") as file:
        split = pd.read_csv(file)
    seen_sha256 = set(split.loc[split["fold"] != "test", "sha256"])
    rows = np.flatnonzero(~pack.table["sha256"].isin(seen_sha256))
    log.info("%d of %d tiles were not seen in training", len(rows), len(pack.table))
    if not len(rows):
        raise DataError(f"--data {data}: the run was trained on all tiles; use another data set")
    return pack, rows


def evaluate(run_id: str, fold: str = "test", data: str | None = None) -> EvaluationResult:
    """Evaluate a run on a fold of its own data, or on ``data`` (see `unseen_tiles`).

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
    """Return accuracy, mean confidence and share out of distribution by kind and severity.

    The first row is of the uncorrupted tiles, with severity 0. At most ``max_tiles`` are drawn,
    the same for each kind.
    """
    rng = np.random.default_rng(0)
    rows = np.sort(rng.choice(result.rows, min(max_tiles, len(result.rows)), replace=False))
    tiles, labels = result.pack.tiles_NHWC[rows], result.pack.labels[rows]
    steps = [("none", 0)]
    steps += list(itertools.product(corruptions.KINDS, corruptions.SEVERITIES))
    table = []
    for kind, severity in track(steps, len(steps), "corruptions", "passes"):
        corrupted = corruptions.corrupt(tiles, kind, severity) if severity else tiles
        batches = TileLoader(TileBatch(corrupted, labels), np.arange(len(corrupted)))
        logits, _ = predict.logits(result.network, batches)
        probabilities = calibration.softmax(logits / result.calibration.temperature)
        is_ood = calibration.energy(logits) > result.calibration.ood_threshold
        table.append(
            {
                "kind": kind,
                "severity": severity,
                "tiles": len(rows),
                "accuracy": float((probabilities.argmax(axis=1) == labels).mean()),
                "confidence": float(probabilities.max(axis=1).mean()),
                "out_of_distribution": float(is_ood.mean()),
            }
        )
    return table


def compare(result: EvaluationResult, other: EvaluationResult) -> dict[str, Any]:
    """Compare ``result`` with ``other`` on the same tiles: `metrics.PairedComparison` as a dict.

    Raises:
        DataError: they were not evaluated on the same tiles.
    """
    if result.tiles != other.tiles or result.pack.fingerprint != other.pack.fingerprint:
        raise DataError(
            f"runs {result.run_id} and {other.run_id} have different {result.fold} "
            "folds: compare runs with the same data set, protocol and split seed"
        )
    comparison = metrics.compare(
        result.labels, result.probabilities, other.probabilities, result.pack.classes
    )
    return {"run": other.run_id} | asdict(comparison)
