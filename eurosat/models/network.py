"""A timm backbone that takes stored pixels (0 to 255) and does its own normalisation."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from eurosat.errors import ModelError

MAX_GROUPS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkSpec:
    """Everything but the weights that is needed to build the same network again."""

    name: str
    classes: tuple[str, ...]
    bands: int
    tile_size: tuple[int, int]
    """Height and width of the training tiles, in pixels."""
    input_size: int | None
    """Side to which tiles are scaled, in pixels; None leaves them as they are."""
    norm: str
    """'batch' or 'group'."""
    drop_rate: float
    mean: tuple[float, ...]
    """Mean of each band, on the scale of the pixels: 0 to 255."""
    std: tuple[float, ...]
    """Standard deviation of each band, on the same scale."""
    tta_views: int = 1
    """Flips and turns of a tile whose logits are averaged outside training: 1 or 8."""
    stem: str = "stock"
    """'stock' or 'small'; see `eurosat.config.ModelConfig`."""


class Network(nn.Module):
    """Maps tiles (N, C, H, W) in [0, 255] to logits (N, K), calibrated outside training."""

    def __init__(self, spec: NetworkSpec, backbone: nn.Module) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = backbone
        self._views = spec.tta_views
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(1, -1, 1, 1))
        self.temperature: Tensor
        """Divides the logits outside training; see `eurosat.evaluation.calibration`."""
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, tiles_NCHW: Tensor) -> Tensor:
        logits = self.logits(tiles_NCHW)
        return logits if self.training else logits / self.temperature

    def logits(self, tiles_NCHW: Tensor) -> Tensor:
        """Return logits before calibration, (N, K): outside training the mean over all views."""
        if self.training or self._views == 1:
            return self._single_view_logits(tiles_NCHW)
        return self.logits_per_view(tiles_NCHW).mean(dim=0)

    def logits_per_view(self, tiles_NCHW: Tensor) -> Tensor:
        """Return logits before calibration, (views, N, K); the first view is the tile itself."""
        views = dihedral_views(tiles_NCHW) if self._views > 1 else [tiles_NCHW]
        return torch.stack([self._single_view_logits(view) for view in views])

    def preprocess(self, tiles_NCHW: Tensor) -> Tensor:
        """Return normalised tiles, scaled to the spec's ``input_size``."""
        normal = (tiles_NCHW.float() - self.mean) / self.std
        if side := self.spec.input_size:
            normal = functional.interpolate(
                normal, (side, side), mode="bilinear", align_corners=False
            )
        return normal

    def _single_view_logits(self, tiles_NCHW: Tensor) -> Tensor:
        logits: Tensor = self.backbone(self.preprocess(tiles_NCHW))
        return logits

    @property
    def head_width(self) -> int:
        """Number of features F that the last layer takes.

        Raises:
            ModelError: the backbone's head is not a single layer.
        """
        head: Any = self.backbone.get_classifier()  # type: ignore[operator]
        if isinstance(head, nn.Linear):
            return head.in_features
        if isinstance(head, nn.Conv2d):
            return head.in_channels
        raise ModelError(
            f"{self.spec.name} has no single last layer, to match a teacher's features: "
            "set distill.features=0, or another model.name"
        )

    def forward_with_features(self, tiles_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input of the head, (N, F), and `logits`; both are means over the views."""
        features: list[Tensor] = []
        backbone: Any = self.backbone
        with backbone.get_classifier().register_forward_pre_hook(
            lambda _, args: features.append(args[0])
        ):
            logits = self.logits(tiles_NCHW)
        return torch.stack(features).mean(dim=0).flatten(1), logits

    @contextmanager
    def single_view(self) -> Iterator[None]:
        """Use only the tile itself, as in training, while the context is active."""
        self._views = 1
        try:
            yield
        finally:
            self._views = self.spec.tta_views


def build_untrained(spec: NetworkSpec) -> Network:
    """Return the network with random weights.

    Raises:
        ModelError: timm has no such model, or cannot build it with these settings.
    """
    return Network(spec, _backbone(spec))


def save(network: Network, file: Path) -> None:
    """Write weights and spec as one safetensors file, which cannot hold code."""
    spec = {name: getattr(network.spec, name) for name in NetworkSpec.__slots__}
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    safetensors.torch.save_file(state, str(file), metadata={"spec": json.dumps(spec)})


def load(file: Path) -> Network:
    """Return the network of a file that `save` wrote, in evaluation mode.

    Raises:
        ModelError: the file is missing, damaged, or does not fit its own spec.
    """
    state, spec = read(file)
    network = build_untrained(spec)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"{file} does not fit {spec.name}: {str(error)[:200]}") from error
    return network.eval()


def check_name(name: str) -> None:
    """Raise ModelError if timm has no such model; the message names similar ones."""
    if not timm.is_model(name):
        close = timm.list_models(f"*{name[:6]}*")[:3]
        raise ModelError(
            f"timm has no model {name!r}; "
            + (f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists all")
        )


def group_norm(channels: int, **kwargs: Any) -> nn.Module:
    """Return a group norm with at most 32 groups (Wu & He 2018)."""
    return nn.GroupNorm(math.gcd(MAX_GROUPS, channels), channels, **kwargs)


def _backbone(spec: NetworkSpec) -> nn.Module:
    check_name(spec.name)
    options: dict[str, Any] = {
        "num_classes": len(spec.classes),
        "in_chans": spec.bands,
        "drop_rate": spec.drop_rate,
    }
    if spec.norm == "group":
        options["norm_layer"] = group_norm
    try:
        backbone = timm.create_model(spec.name, **options)
    except Exception as error:
        raise ModelError(f"timm cannot build {spec.name} with {options}: {error}") from error
    if spec.stem == "small":
        _small_stem(backbone, spec)
    return backbone


def _small_stem(backbone: Any, spec: NetworkSpec) -> None:
    """Remove the pooling of a ResNet's stem, and replace its 7x7 convolution by a 3x3."""
    stock = getattr(backbone, "conv1", None)
    if not isinstance(stock, nn.Conv2d | nn.Sequential) or not hasattr(backbone, "maxpool"):
        raise ModelError(
            f"model.stem=small is for ResNets, and {spec.name} is none: set model.stem=stock"
        )
    backbone.maxpool = nn.Identity()
    if isinstance(stock, nn.Conv2d):
        small = nn.Conv2d(spec.bands, stock.out_channels, 3, stride=2, padding=1, bias=False)
        nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
        backbone.conv1 = small


def read(file: Path) -> tuple[dict[str, Tensor], NetworkSpec]:
    """Return tensors and spec of a file that `save` wrote.

    Raises:
        ModelError: the file is missing, damaged, or was not written by `save`.
    """
    try:
        state = safetensors.torch.load_file(str(file))
        with safetensors.safe_open(str(file), framework="pt") as opened:
            values = json.loads((opened.metadata() or {})["spec"])
        tuples = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
        return state, NetworkSpec(**_current_names(values | tuples))
    except (OSError, safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ModelError(
            f"{file} is not a weights file of this project ({type(error).__name__}: {error}): "
            "give the weights.safetensors of a training run, or set weights=none"
        ) from error


def _current_names(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a spec under their current names; earlier files use others."""
    if "views" in values:
        values["tta_views"] = values.pop("views")
    if values.get("stem") == "gentle":
        values["stem"] = "small"
    return values


def dihedral_views(tiles_NCHW: Tensor) -> list[Tensor]:
    """Return all eight flips and turns (four if H differs from W) for test-time augmentation."""
    views = [tiles_NCHW, tiles_NCHW.flip(-1), tiles_NCHW.flip(-2), tiles_NCHW.flip(-1, -2)]
    if tiles_NCHW.shape[-1] == tiles_NCHW.shape[-2]:
        views += [view.transpose(-1, -2) for view in views]
    return views
