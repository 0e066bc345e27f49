"""The data, fold and network of a recorded run."""

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from eurosat import tracking
from eurosat.config import DataConfig, compose, from_mapping
from eurosat.data.pack import Pack, open_pack
from eurosat.data.split import make_split
from eurosat.errors import ConfigError, DataError
from eurosat.evaluation.calibration import Calibration
from eurosat.models import network
from eurosat.models.network import Network


def recorded_data(run_id: str) -> DataConfig:
    """Where the data of a run are from, looked for where this machine has them.

    Raises:
        TrackingError: the run has no config.yaml.
        ConfigError: it was written by an incompatible version.
    """
    with tracking.artifact(run_id, "config.yaml") as file:
        whole = yaml.safe_load(file.read_text())
    if not isinstance(whole, dict) or not isinstance(whole.get("data"), dict):
        raise ConfigError(f"config.yaml of run {run_id} does not say which data: train again")
    values: dict[str, Any] = whole["data"]
    here = compose(["data=eurosat"]).data
    values["cache"] = here.cache
    if values["source"] == "eurosat":
        values["root"] = here.root or values["root"]
    return from_mapping(DataConfig, values, "data")


def recorded_network(run_id: str) -> tuple["Network", "Calibration"]:
    """A run's weights, and how far its confidence can be trusted."""
    with tracking.artifact(run_id, "weights.safetensors") as file:
        net = network.load(file)
    with tracking.artifact(run_id, "calibration.json") as file:
        return net, Calibration.from_dict(json.loads(file.read_text()))


def recorded_fold(run_id: str, fold: str) -> tuple["Pack", "npt.NDArray[np.int64]"]:
    """The tiles of a fold of the data and split that a run was made with.

    Raises:
        DataError: the data or the split are no longer those of the run.
    """
    config, tags = recorded_data(run_id), tracking.get(run_id).tags
    pack = open_pack(config)
    split = make_split(pack.table, *config.split_options)
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
