"""A timm backbone that takes pixels as they are stored and knows its own normalisation."""

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

GROUPS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkSpec:
    """What is needed, beside the weights, to build the same network again."""

    name: str
    classes: tuple[str, ...]
    bands: int
    tile_size: tuple[int, int]
    """Height and width of the tiles it was trained on."""
    input_size: int | None
    norm: str
    """'batch' or 'group'."""
    drop_rate: float
    mean: tuple[float, ...]
    """Of each band, on the scale of the pixels: 0 to 255."""
    std: tuple[float, ...]
    tta_views: int = 1
    """Flips and turns of a tile that are looked at for one answer, outside training."""
    stem: str = "stock"
    """'stock' or 'small', see `eurosat.config.ModelConfig`."""


class Network(nn.Module):
    """Pixels in [0, 255], (N, C, H, W), to logits (N, K), calibrated outside training."""

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
        """Logits are divided by it outside training; see `eurosat.evaluation.calibration`."""
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, tiles_NCHW: Tensor) -> Tensor:
        logits = self.logits(tiles_NCHW)
        return logits if self.training else logits / self.temperature

    def logits(self, tiles_NCHW: Tensor) -> Tensor:
        """(N, K), before calibration; outside training the mean over the views of a tile."""
        if self.training or self._views == 1:
            return self._of_one_view(tiles_NCHW)
        return self.logits_per_view(tiles_NCHW).mean(dim=0)

    def logits_per_view(self, tiles_NCHW: Tensor) -> Tensor:
        """(views, N, K), before calibration; the first view is the tile as it is."""
        views = dihedral_views(tiles_NCHW) if self._views > 1 else [tiles_NCHW]
        return torch.stack([self._of_one_view(view) for view in views])

    def preprocess(self, tiles_NCHW: Tensor) -> Tensor:
        """What the backbone is given: normalised, and as large as it takes them."""
        normal = (tiles_NCHW.float() - self.mean) / self.std
        if side := self.spec.input_size:
            normal = functional.interpolate(
                normal, (side, side), mode="bilinear", align_corners=False
            )
        return normal

    def _of_one_view(self, tiles_NCHW: Tensor) -> Tensor:
        logits: Tensor = self.backbone(self.preprocess(tiles_NCHW))
        return logits

    @property
    def head_width(self) -> int:
        """F, how many features of a tile the last layer is given.

        Raises:
            ModelError: this backbone has no head that is one layer.
        """
        head: Any = self.backbone.get_classifier()  # type: ignore[operator]
        if isinstance(head, nn.Linear):
            return head.in_features
        if isinstance(head, nn.Conv2d):
            return head.in_channels
        raise ModelError(
            f"{self.spec.name} has no single last layer whose input could be matched: say "
            "distill.features=0, or take another model"
        )

    def forward_with_features(self, tiles_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(N, F), what the head is given of each tile, and `logits`; both means over the views."""
        given: list[Tensor] = []
        backbone: Any = self.backbone
        with backbone.get_classifier().register_forward_pre_hook(
            lambda _, args: given.append(args[0])
        ):
            logits = self.logits(tiles_NCHW)
        return torch.stack(given).mean(dim=0).flatten(1), logits

    @contextmanager
    def single_view(self) -> Iterator[None]:
        """While it is entered, a tile is looked at once, as in training."""
        self._views = 1
        try:
            yield
        finally:
            self._views = self.spec.tta_views


def build_untrained(spec: NetworkSpec) -> Network:
    """The network with random weights.

    Raises:
        ModelError: timm has no such model, or cannot build it so.
    """
    return Network(spec, _backbone(spec))


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
    state, spec = read(file)
    network = build_untrained(spec)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"{file} does not fit {spec.name}: {str(error)[:200]}") from error
    return network.eval()


def check_name(name: str) -> None:
    """Raise ModelError, naming models like it, where timm has no such model."""
    if not timm.is_model(name):
        close = timm.list_models(f"*{name[:6]}*")[:3]
        raise ModelError(
            f"timm has no model {name!r}; "
            + (f"did you mean {', '.join(close)}?" if close else "timm.list_models() names them")
        )


def group_norm(channels: int, **where: Any) -> nn.Module:
    """As many as 32 groups, as in Wu & He (2018)."""
    return nn.GroupNorm(math.gcd(GROUPS, channels), channels, **where)


def _backbone(spec: NetworkSpec) -> nn.Module:
    check_name(spec.name)
    arguments: dict[str, Any] = {
        "num_classes": len(spec.classes),
        "in_chans": spec.bands,
        "drop_rate": spec.drop_rate,
    }
    if spec.norm == "group":
        arguments["norm_layer"] = group_norm
    try:
        backbone = timm.create_model(spec.name, **arguments)
    except Exception as error:
        raise ModelError(f"timm cannot build {spec.name} with {arguments}: {error}") from error
    if spec.stem == "small":
        _soften(backbone, spec)
    return backbone


def _soften(backbone: Any, spec: NetworkSpec) -> None:
    """Take the pooling out of a ResNet's stem, and make its one large convolution a 3x3."""
    stock = getattr(backbone, "conv1", None)
    if not isinstance(stock, nn.Conv2d | nn.Sequential) or not hasattr(backbone, "maxpool"):
        raise ModelError(
            f"model.stem=small is for ResNets, and {spec.name} is none: say model.stem=stock"
        )
    backbone.maxpool = nn.Identity()
    if isinstance(stock, nn.Conv2d):
        soft = nn.Conv2d(spec.bands, stock.out_channels, 3, stride=2, padding=1, bias=False)
        nn.init.kaiming_normal_(soft.weight, mode="fan_out", nonlinearity="relu")
        backbone.conv1 = soft


def read(file: Path) -> tuple[dict[str, Tensor], NetworkSpec]:
    """Tensors and spec of a file that `save` wrote.

    Raises:
        ModelError: the file is missing, damaged, or not ours.
    """
    try:
        state = safetensors.torch.load_file(str(file))
        with safetensors.safe_open(str(file), framework="pt") as opened:
            values = json.loads((opened.metadata() or {})["spec"])
        tuples = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
        return state, NetworkSpec(**_current_names(values | tuples))
    except (OSError, safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ModelError(
            f"{file} is not weights of ours ({type(error).__name__}: {error}): "
            "give a weights.safetensors of a training run, or weights=none"
        ) from error


def _current_names(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a spec, also as files before version 0.2 name them."""
    if "views" in values:
        values["tta_views"] = values.pop("views")
    if values.get("stem") == "gentle":
        values["stem"] = "small"
    return values


def dihedral_views(tiles_NCHW: Tensor) -> list[Tensor]:
    """All eight flips and turns (four where H differs from W), for test-time averaging."""
    views = [tiles_NCHW, tiles_NCHW.flip(-1), tiles_NCHW.flip(-2), tiles_NCHW.flip(-1, -2)]
    if tiles_NCHW.shape[-1] == tiles_NCHW.shape[-2]:
        views += [view.transpose(-1, -2) for view in views]
    return views
