"""Grad-CAM++ heat maps of tiles, and pages that show them (Chattopadhay et al. 2018)."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from pytorch_grad_cam import GradCAMPlusPlus
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from eurosat.errors import ModelError
from eurosat.evaluation.metrics import per_tile_nll
from eurosat.evaluation.plots import DPI, set_title, visible
from eurosat.models.network import Network
from eurosat.runtime import templates

Tiles = npt.NDArray[np.uint8]
MIN_MAP_SIDE = 4
"""Smallest side of the feature map that is explained, in pixels.

The last stage of a ResNet has only 2 x 2 for a 64 px tile.
"""
MAX_HARDEST = 6
"""Tiles with the highest loss in a `gallery`, before the most confident of each class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CamResult:
    """The prediction for one tile and its heat maps."""

    tile: str
    pixels_HWC: Tiles
    expected: str | None
    """True class, if it is known."""
    label: str
    """Predicted class."""
    confidence: float
    heat: npt.NDArray[np.float32]
    """(H, W) in [0, 1]: the evidence for ``label``."""
    heat_expected: npt.NDArray[np.float32] | None
    """(H, W) in [0, 1]: the evidence for ``expected``, if the prediction is wrong."""


def explain(
    network: Network, tiles_NHWC: Tiles, names: Sequence[str], expected: Sequence[str | None]
) -> list[CamResult]:
    """Return label, confidence and heat maps of each tile.

    Raises:
        ModelError: the backbone has no feature map that could be shown.
    """
    classes = network.spec.classes
    network.eval()
    tiles_NCHW = torch.from_numpy(tiles_NHWC.astype(np.float32)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        probabilities = network(tiles_NCHW).softmax(dim=1).numpy()
    labels = probabilities.argmax(axis=1)
    heat = heat_maps(network, tiles_NCHW, labels)
    wrong = [n for n, name in enumerate(expected) if name in classes and name != classes[labels[n]]]
    true_labels = np.array([classes.index(str(expected[n])) for n in wrong], np.int64)
    wrong_heat = heat_maps(network, tiles_NCHW[wrong], true_labels)
    heat_expected = dict(zip(wrong, wrong_heat, strict=True))
    return [
        CamResult(
            tile=names[n],
            pixels_HWC=tiles_NHWC[n],
            expected=expected[n],
            label=classes[int(labels[n])],
            confidence=float(probabilities[n].max()),
            heat=heat[n],
            heat_expected=heat_expected.get(n),
        )
        for n in range(len(tiles_NHWC))
    ]


def heat_maps(
    network: Network, tiles_NCHW: Tensor, classes: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Return (N, H, W) Grad-CAM++ maps in [0, 1], of one class for each tile, without TTA.

    Raises:
        ModelError: the backbone has no feature map that could be shown.
    """
    if not len(classes):
        return np.empty((0, *tiles_NCHW.shape[2:]), np.float32)
    targets = [ClassifierOutputTarget(int(k)) for k in classes]
    with network.single_view():
        layer, transform = _find_target_layer(network, tiles_NCHW[:1])
        with GradCAMPlusPlus(network, [layer], reshape_transform=transform) as cam:
            heat: npt.NDArray[np.float32] = cam(tiles_NCHW, targets)
    return heat


def _find_target_layer(network: Network, tile_NCHW: Tensor) -> tuple[nn.Module, Any]:
    """Return the layer to explain, and a transform of its output to (N, C, h, w).

    The transform is None if the output has that shape already.
    """
    backbone: Any = network.backbone
    if hasattr(backbone, "patch_embed") and hasattr(backbone, "blocks"):
        return _last_tokens(backbone)
    return _last_feature_map(network, tile_NCHW)


def _last_tokens(backbone: Any) -> tuple[nn.Module, Any]:
    """Return the last block of a transformer, and what makes a map of its tokens."""
    height, width = backbone.patch_embed.grid_size
    prefix = getattr(backbone, "num_prefix_tokens", 0)

    def tokens_to_map(tokens: Tensor) -> Tensor:
        batch, _, channels = tokens.shape
        grid = tokens[:, prefix:].reshape(batch, height, width, channels)
        return grid.permute(0, 3, 1, 2)

    return backbone.blocks[-1].norm1, tokens_to_map


def _last_feature_map(network: Network, tile_NCHW: Tensor) -> tuple[nn.Module, Any]:
    """Return the last layer whose output is a map of at least MIN_MAP_SIDE."""
    backbone: Any = network.backbone
    candidates: list[nn.Module] = []
    channels_last = "NHWC" in str(getattr(backbone, "output_fmt", "NCHW"))  # as timm's Swin
    height, width = (1, 2) if channels_last else (2, 3)

    def collect(module: nn.Module, _: Any, output: Any) -> None:
        is_map = isinstance(output, torch.Tensor) and output.ndim == 4
        if is_map and min(output.shape[height], output.shape[width]) >= MIN_MAP_SIDE:
            candidates.append(module)

    hooks = [module.register_forward_hook(collect) for module in backbone.modules()]
    try:
        with torch.inference_mode():
            network(tile_NCHW)
    finally:
        for hook in hooks:
            hook.remove()
    if not candidates:
        raise ModelError(
            f"{network.spec.name} has no feature map of at least {MIN_MAP_SIDE}x{MIN_MAP_SIDE} to "
            "explain: use a convolutional network or a vision transformer"
        )
    return candidates[-1], _channels_first if channels_last else None


def _channels_first(map_NHWC: Tensor) -> Tensor:
    return map_NHWC.permute(0, 3, 1, 2)


def gallery(
    network: Network,
    tiles_NHWC: Tiles,
    names: Sequence[str],
    labels: npt.NDArray[np.int64],
    probabilities: npt.NDArray[np.float64],
) -> list[CamResult]:
    """Explain the tiles with the highest loss, then the most confident correct tile per class."""
    loss = per_tile_nll(labels, probabilities)
    right = probabilities.argmax(axis=1) == labels
    hardest = np.argsort(-loss, kind="stable")[:MAX_HARDEST]
    most_confident = [
        min(correct, key=lambda n: loss[n])
        for k in range(len(network.spec.classes))
        if len(correct := np.flatnonzero(right & (labels == k)))
    ]
    chosen = np.asarray([*hardest, *most_confident])
    expected = [network.spec.classes[int(labels[n])] for n in chosen]
    return explain(network, tiles_NHWC[chosen], [names[n] for n in chosen], expected)


def draw_page(results: Sequence[CamResult], title: str, file: Path) -> None:
    """Draw the tiles as a PNG page, each with the heat of its label and of the true class."""
    columns = 2
    lines = math.ceil(len(results) / columns)
    figure = Figure(figsize=(5.4 * columns, 2.0 * lines + 0.4), layout="constrained")
    grid = figure.subplots(lines, 3 * columns, squeeze=False)
    for axes in grid.ravel():
        axes.set_axis_off()
    for number, result in enumerate(results):
        left = 3 * (number % columns)
        _draw_result(result, grid[number // columns, left : left + 3])
    set_title(figure, title)
    figure.savefig(file, dpi=DPI)


def _draw_result(result: CamResult, three_axes: Any) -> None:
    tile_axes, label_axes, expected_axes = three_axes
    image = visible(result.pixels_HWC)
    tile_axes.imshow(image, cmap="gray")
    tile_axes.set_title(Path(result.tile).name[-28:], fontsize=7)
    is_wrong = result.expected not in (None, result.label)
    colour = "firebrick" if is_wrong else "black"
    for axes, heat, caption in (
        (label_axes, result.heat, f"{result.label} {result.confidence:.3f}"),
        (expected_axes, result.heat_expected, f"true: {result.expected}"),
    ):
        if heat is not None:
            axes.imshow(image, cmap="gray")
            axes.imshow(heat, cmap="inferno", alpha=0.5, vmin=0, vmax=1)
            axes.set_title(caption, fontsize=7, color=colour)


def render_html(results: Sequence[CamResult], title: str) -> str:
    """Return the same page as one HTML file with its images inside."""
    rows = []
    for result in results:
        heats = [None, result.heat]
        if result.heat_expected is not None:
            heats.append(result.heat_expected)
        pngs = [_base64_png(result.pixels_HWC, heat) for heat in heats]
        rows.append({"result": result, "pngs": pngs})
    return templates.render("eurosat.evaluation", "gradcam.html.j2", title=title, rows=rows)


def _base64_png(pixels_HWC: Tiles, heat: npt.NDArray[np.float32] | None) -> str:
    """Return a PNG of the tile, mixed with the heat map if there is one, in base64."""
    pixels = visible(pixels_HWC).astype(np.float32)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    if heat is not None:
        pixels = 0.5 * pixels + 127.5 * colormaps["inferno"](heat)[:, :, :3].astype(np.float32)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
