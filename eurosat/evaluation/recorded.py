"""Load what a run was made with: its data settings, its fold of tiles, its network."""

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
    """Return the data settings of a run, with the root and cache of this machine.

    Raises:
        TrackingError: the run has no config.yaml.
        ConfigError: config.yaml was written by an incompatible version.
    """
    with tracking.artifact(run_id, "config.yaml") as file:
        config = yaml.safe_load(file.read_text())
    if not isinstance(config, dict) or not isinstance(config.get("data"), dict):
        raise ConfigError(f"config.yaml of run {run_id} has no section `data`: train again")
    values: dict[str, Any] = config["data"]
    local = compose(["data=eurosat"]).data
    values["cache"] = local.cache
    if values["source"] == "eurosat":
        values["root"] = local.root or values["root"]
    return from_mapping(DataConfig, values, "data")


def recorded_network(run_id: str) -> tuple[Network, Calibration]:
    """Load the weights and the calibration of a run."""
    with tracking.artifact(run_id, "weights.safetensors") as file:
        net = network.load(file)
    with tracking.artifact(run_id, "calibration.json") as file:
        return net, Calibration.from_dict(json.loads(file.read_text()))


def recorded_fold(run_id: str, fold: str) -> tuple[Pack, npt.NDArray[np.int64]]:
    """Open the data set of a run, and return it with the rows of one fold.

    Raises:
        DataError: the data or the split differ from those of the run.
    """
    config, tags = recorded_data(run_id), tracking.get(run_id).tags
    pack = open_pack(config)
    split = make_split(pack.table, *config.split_options)
    fingerprints = {
        "data.fingerprint": pack.fingerprint,
        "split.fingerprint": split.fingerprint,
    }
    for name, current in fingerprints.items():
        if tags.get(name) != current:
            raise DataError(
                f"{name} of run {run_id} is {tags.get(name)}, but that of the data here is "
                f"{current}: set EUROSAT_ROOT to the data it was trained on"
            )
    return pack, split.indices(fold)
