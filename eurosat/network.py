"""A timm backbone that takes pixels as they are stored and knows its own normalisation."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from eurosat.config import ModelConfig
from eurosat.errors import ModelError

log = logging.getLogger(__name__)

NO_WEIGHTS, HUB_WEIGHTS = "none", "imagenet"


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkSpec:
    """What is needed, beside the weights, to build the same network again."""

    name: str
    classes: tuple[str, ...]
    bands: int
    tile_size: tuple[int, int]
    """Height and width of the tiles it was trained on."""
    input_size: int | None
    drop_rate: float
    mean: tuple[float, ...]
    """Of each band, on the scale of the pixels: 0 to 255."""
    std: tuple[float, ...]


class Network(nn.Module):
    """Pixels in [0, 255], (N, C, H, W), to logits (N, K)."""

    def __init__(self, spec: NetworkSpec, backbone: nn.Module) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = backbone
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(1, -1, 1, 1))

    def forward(self, tiles_NCHW: Tensor) -> Tensor:
        normal = (tiles_NCHW.float() - self.mean) / self.std
        if self.spec.input_size is not None:
            size = (self.spec.input_size, self.spec.input_size)
            normal = functional.interpolate(normal, size, mode="bilinear", align_corners=False)
        logits: Tensor = self.backbone(normal)
        return logits


def create(
    config: ModelConfig,
    *,
    weights: str,
    classes: Sequence[str],
    bands: int,
    tile_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
) -> Network:
    """Build a network; ``weights`` is 'none', 'imagenet' or a file that `save` wrote.

    Raises:
        ModelError: no such timm model, a hub that cannot be reached, weights that do not fit.
    """
    spec = NetworkSpec(
        name=config.name,
        classes=tuple(classes),
        bands=bands,
        tile_size=tile_size,
        input_size=config.input_size,
        drop_rate=config.drop_rate,
        mean=tuple(mean),
        std=tuple(std),
    )
    network = Network(spec, _backbone(spec, pretrained=weights == HUB_WEIGHTS))
    if weights not in (NO_WEIGHTS, HUB_WEIGHTS):
        _start_from(network, Path(weights).expanduser())
    return network


def untrained(spec: NetworkSpec) -> Network:
    """The network with random weights."""
    return Network(spec, _backbone(spec, pretrained=False))


def save(network: Network, file: Path) -> None:
    """Write weights and spec as one safetensors file: nothing in it can be executed."""
    spec = {name: getattr(network.spec, name) for name in NetworkSpec.__slots__}
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    safetensors.torch.save_file(state, str(file), metadata={"spec": json.dumps(spec)})


def load(file: Path) -> Network:
    """Read what `save` wrote.

    Raises:
        ModelError: the file is missing, damaged, or of another network.
    """
    state, spec = _read(file)
    network = untrained(spec)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"{file} does not fit {spec.name}: {str(error)[:200]}") from error
    return network.eval()


def _backbone(spec: NetworkSpec, *, pretrained: bool) -> nn.Module:
    if not timm.is_model(spec.name):
        close = timm.list_models(f"*{spec.name[:6]}*")[:3]
        raise ModelError(
            f"timm has no model {spec.name!r}; "
            + (f"did you mean {', '.join(close)}?" if close else "timm.list_models() names them")
        )
    arguments: dict[str, Any] = {
        "num_classes": len(spec.classes), "in_chans": spec.bands, "drop_rate": spec.drop_rate,
    }  # fmt: skip
    if pretrained:
        log.info("getting the ImageNet weights of %s from timm's hub", spec.name)
    try:
        return timm.create_model(spec.name, pretrained=pretrained, **arguments)
    except Exception as error:
        if not pretrained:
            raise ModelError(f"timm cannot build {spec.name} with {arguments}: {error}") from error
        raise ModelError(
            f"ImageNet weights of {spec.name} could not be downloaded ({type(error).__name__}); "
            "check the network, or say weights=none or weights=FILE.safetensors"
        ) from error


def _start_from(network: Network, file: Path) -> None:
    """Load all but the head where the classes differ."""
    state, spec = _read(file)
    own = network.state_dict()
    kept = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    misfits = [k for k in own if k not in kept]
    same_head = spec.classes == network.spec.classes
    if spec.name != network.spec.name or len(misfits) > (0 if same_head else 2):
        raise ModelError(
            f"{file} holds {spec.name} with {spec.bands} bands, not {network.spec.name} with "
            f"{network.spec.bands} ({len(misfits)} of {len(own)} tensors do not fit): "
            f"say model.name={spec.name}, or give other weights"
        )
    network.load_state_dict(own | kept)


def _read(file: Path) -> tuple[dict[str, Tensor], NetworkSpec]:
    try:
        state = safetensors.torch.load_file(str(file))
        with safetensors.safe_open(str(file), framework="pt") as opened:
            values = json.loads((opened.metadata() or {})["spec"])
        tuples = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
        return state, NetworkSpec(**(values | tuples))
    except (OSError, safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ModelError(
            f"{file} is not weights of ours ({type(error).__name__}: {error}): "
            "give a weights.safetensors of a training run, or weights=none"
        ) from error
