"""Judge a trained run or a registered version: figures with error bars, told and kept."""

import json
import logging
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from eurosat import cli, logs, tracking
from eurosat.config import DataConfig, build, compose
from eurosat.errors import ConfigError, DataError
from eurosat.split import FOLDS

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from eurosat.calibration import Calibration
    from eurosat.metrics import Floats, Labels
    from eurosat.network import Network
    from eurosat.pack import Pack

log = logging.getLogger(__name__)

ALL = "all"
"""The fold of other data: every tile that the run did not learn from."""
CORRUPTED_TILES = 1000
"""Tiles of the fold that the corruptions are tried on: 40 passes over them."""
WORST = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
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
        from eurosat.calibration import softmax

        return softmax(self.logits / self.calibration.temperature)

    @property
    def tiles(self) -> list[str]:
        return list(self.pack.table["path"].iloc[self.rows])


class Seen(NamedTuple):
    """Tiles that are not in a pack."""

    tiles_NHWC: "npt.NDArray[np.uint8]"
    labels: "Labels"


def recorded_data(run_id: str) -> DataConfig:
    """Where the data of a run are from, looked for where this machine has them.

    Raises:
        TrackingError: the run has no config.yaml.
        ConfigError: it was written by an incompatible version.
    """
    import yaml

    with tracking.artifact(run_id, "config.yaml") as file:
        whole = yaml.safe_load(file.read_text())
    if not isinstance(whole, dict) or not isinstance(whole.get("data"), dict):
        raise ConfigError(f"config.yaml of run {run_id} does not say which data: train again")
    values: dict[str, Any] = whole["data"]
    here = compose(["data=eurosat"]).data
    values["cache"] = here.cache
    if values["source"] == "eurosat":
        values["root"] = here.root or values["root"]
    return build(DataConfig, values, "data")


def recorded_network(run_id: str) -> tuple["Network", "Calibration"]:
    """A run's weights, and how far its confidence can be trusted."""
    from eurosat import network
    from eurosat.calibration import Calibration

    with tracking.artifact(run_id, "weights.safetensors") as file:
        net = network.load(file)
    with tracking.artifact(run_id, "calibration.json") as file:
        return net, Calibration.from_dict(json.loads(file.read_text()))


def recorded_fold(run_id: str, fold: str) -> tuple["Pack", "npt.NDArray[np.int64]"]:
    """The tiles of a fold of the data and split that a run was made with.

    Raises:
        DataError: the data or the split are no longer those of the run.
    """
    from eurosat.pack import open_pack
    from eurosat.split import make_split

    config, tags = recorded_data(run_id), tracking.get(run_id).tags
    pack = open_pack(config)
    split = make_split(pack.table, *config.split)
    for name, now in (
        ("data.fingerprint", pack.fingerprint),
        ("split.fingerprint", split.fingerprint),
    ):
        if tags.get(name) != now:
            raise DataError(
                f"{name} of run {run_id} is {tags.get(name)}, but the data here give {now}: "
                "point EUROSAT_ROOT to the data it was trained on"
            )
    return pack, split.indices(fold)


def other_tiles(run_id: str, network: "Network", data: str) -> tuple["Pack", Any]:
    """The tiles of another data set that the run neither learned from nor was chosen by.

    Raises:
        DataError: classes, bands or size are not those of the network, or no tile is left.
    """
    import numpy as np
    import pandas as pd

    from eurosat.pack import open_pack

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


def evaluate(run_id: str, fold: str = "test", data: str | None = None) -> Judged:
    """Answers of the run's weights on a fold of its own data, or on ``data``.

    Raises:
        DataError: see `recorded_fold` and `other_tiles`.
    """
    from eurosat import module
    from eurosat.batches import Batches

    net, calibration = recorded_network(run_id)
    pack, rows = other_tiles(run_id, net, data) if data else recorded_fold(run_id, fold)
    logits, labels = module.logits(net, Batches(pack, rows))
    return Judged(
        run_id=run_id, fold=ALL if data else fold, network=net, calibration=calibration,
        pack=pack, rows=rows, logits=logits, labels=labels,
    )  # fmt: skip


def under_corruptions(judged: Judged, most: int = CORRUPTED_TILES) -> list[dict[str, Any]]:
    """Accuracy, mean confidence and share told unlike, by kind and severity (0: untouched)."""
    import numpy as np

    from eurosat import calibration, corruptions, module
    from eurosat.batches import Batches
    from eurosat.progress import track

    rng = np.random.default_rng(0)
    rows = np.sort(rng.choice(judged.rows, min(most, len(judged.rows)), replace=False))
    tiles, labels = judged.pack.tiles_NHWC[rows], judged.pack.labels[rows]
    steps = [("none", 0)]
    steps += [(kind, one) for kind in corruptions.KINDS for one in corruptions.SEVERITIES]
    table = []
    for kind, severity in track(steps, len(steps), "corruptions", "passes"):
        seen = corruptions.corrupt(tiles, kind, severity) if severity else tiles
        batches = Batches(Seen(seen, labels), np.arange(len(seen)))
        logits, _ = module.logits(judged.network, batches)
        probabilities = calibration.softmax(logits / judged.calibration.temperature)
        unlike = calibration.energy(logits) > judged.calibration.unlike_above
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


def compared(judged: Judged, other: Judged) -> dict[str, Any]:
    """``judged`` against ``other`` on the same tiles.

    Raises:
        DataError: they were not judged on the same tiles.
    """
    from eurosat import metrics

    if judged.tiles != other.tiles or judged.pack.fingerprint != other.pack.fingerprint:
        raise DataError(
            f"runs {judged.run_id} and {other.run_id} have other {judged.fold} folds: "
            "compare runs of one data set, protocol and split seed"
        )
    found = metrics.compare(
        judged.labels, judged.probabilities, other.probabilities, judged.pack.classes
    )
    return {"run": other.run_id} | asdict(found)


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("eurosat.evaluate", __doc__ or "")
    parser.add_argument("run", metavar="RUN", help="run id, runs:/ID or models:/eurosat@champion")
    parser.add_argument("--fold", choices=FOLDS, default="test")
    parser.add_argument("--data", help="other tiles: synthetic, or 'folder data.root=DIR'")
    parser.add_argument("--against", metavar="OTHER", help="a run or version to compare with")
    parser.add_argument("--corruptions", action="store_true", help="haze, blur, noise and others")
    parser.add_argument("--corruption-tiles", type=int, default=CORRUPTED_TILES, metavar="N")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    from eurosat import report

    judged = evaluate(tracking.resolve_run(args.run), args.fold, args.data)
    told = report.figures(judged)
    if args.data:
        told["data"] = args.data
    if args.against:
        other = evaluate(tracking.resolve_run(args.against), args.fold, args.data)
        told["against"] = compared(judged, other)
    if args.corruptions:
        told["corruptions"] = under_corruptions(judged, args.corruption_tiles)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "figures.json").write_text(json.dumps(told, indent=1))
        (folder / "report.md").write_text(report.markdown(told))
        report.draw(judged, told, folder)
        kept = f"evaluation/{judged.fold}"
        if args.data:
            kept += "-" + re.sub(r"[^\w.]+", "-", args.data).strip("-")
        with tracking.attached(judged.run_id) as run:
            run.log_folder(folder, kept)
    print(report.markdown(told))
    print(f"in run {judged.run_id}: {kept}")
    return cli.OK


if __name__ == "__main__":
    cli.finish(main)
