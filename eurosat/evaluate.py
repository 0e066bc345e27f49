"""Judge a trained run, or a registered version, on a fold of its own data."""

import json
import logging
from collections.abc import Sequence
from typing import Any

from eurosat import cli, logs, tracking
from eurosat.config import TrainConfig, build, compose
from eurosat.errors import DataError
from eurosat.split import FOLDS

log = logging.getLogger(__name__)


def recorded_config(run_id: str) -> TrainConfig:
    """The configuration that a run was made with, looking for its data where this machine has it.

    Raises:
        TrackingError: the run has no config.yaml.
        ConfigError: it was written by an incompatible version.
    """
    import yaml

    with tracking.artifact(run_id, "config.yaml") as file:
        values: dict[str, Any] = yaml.safe_load(file.read_text())
    here = compose(["data=eurosat"]).data
    values["data"]["cache"] = here.cache
    if values["data"]["source"] == "eurosat":
        values["data"]["root"] = here.root or values["data"]["root"]
    return build(TrainConfig, values)


def evaluate(run_id: str, fold: str) -> dict[str, float]:
    """Figures of merit of the run's weights on a fold of the data and split it was made with.

    Raises:
        DataError: the data or the split are no longer those of the run.
    """
    from eurosat import metrics, network
    from eurosat.batches import EVAL_BATCH, Batches
    from eurosat.module import predict
    from eurosat.pack import open_pack
    from eurosat.split import make_split

    config, tags = recorded_config(run_id), tracking.get(run_id).tags
    pack = open_pack(config.data)
    split = make_split(pack.table, config.data.protocol, config.data.split_seed)
    for name, now in (
        ("data.fingerprint", pack.fingerprint),
        ("split.fingerprint", split.fingerprint),
    ):
        if tags.get(name) != now:
            raise DataError(
                f"{name} of run {run_id} is {tags.get(name)}, but the data here give {now}: "
                "point EUROSAT_ROOT to the data it was trained on"
            )
    with tracking.artifact(run_id, "weights.safetensors") as file:
        net = network.load(file)
    probabilities, labels = predict(net, Batches(pack, split.indices(fold), EVAL_BATCH))
    return metrics.evaluate(labels.numpy(), probabilities.numpy(), pack.classes)


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("eurosat.evaluate", __doc__ or "")
    parser.add_argument("run", metavar="RUN", help="run id, runs:/ID or models:/eurosat@champion")
    parser.add_argument("--fold", choices=FOLDS, default="test")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    run_id = tracking.resolve_run(args.run)
    figures = evaluate(run_id, args.fold)
    tracking.add_text(run_id, json.dumps(figures, indent=1), f"evaluation/{args.fold}.json")
    for name, value in figures.items():
        print(f"{name:32} {value:.4f}")
    return cli.OK


if __name__ == "__main__":
    cli.finish(main)
