"""Where a network looked: Grad-CAM++ maps and pages of tiles (Chattopadhay et al. 2018)."""

import base64
import html
import io
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
from eurosat.evaluation.plots import DPI, visible
from eurosat.models.network import Network

Tiles = npt.NDArray[np.uint8]
MIN_MAP_SIDE = 4
"""Pixels of the map that is explained: the last stage of a ResNet has 2 x 2 on a 64 px tile."""
MAX_HARDEST = 6
"""Tiles in the gallery at the end of a training, before the surest of each class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CamResult:
    tile: str
    pixels_HWC: Tiles
    expected: str | None
    label: str
    confidence: float
    heat: npt.NDArray[np.float32]
    """(H, W) in [0, 1]: what spoke for ``label``."""
    heat_expected: npt.NDArray[np.float32] | None
    """What spoke for ``expected``, where that is known and another class."""


def explain(
    network: "Network", tiles_NHWC: Tiles, names: Sequence[str], expected: Sequence[str | None]
) -> list[CamResult]:
    """Label, confidence and heat maps of each tile.

    Raises:
        ModelError: the backbone has no map of features that could be shown.
    """
    classes = network.spec.classes
    network.eval()
    tiles_NCHW = torch.from_numpy(tiles_NHWC.astype(np.float32)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        probabilities = network(tiles_NCHW).softmax(dim=1).numpy()
    labels = probabilities.argmax(axis=1)
    heat = heat_maps(network, tiles_NCHW, labels)
    missed = [
        n for n, name in enumerate(expected) if name in classes and name != classes[labels[n]]
    ]
    asked = np.asarray([classes.index(str(expected[n])) for n in missed])
    heat_expected = dict(zip(missed, heat_maps(network, tiles_NCHW[missed], asked), strict=True))
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
    network: "Network", tiles_NCHW: "Tensor", classes: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """(N, H, W) in [0, 1]: Grad-CAM++ of the given class of each tile, as it stands.

    Raises:
        ModelError: the backbone has no map of features that could be shown.
    """
    if not len(classes):
        return np.empty((0, *tiles_NCHW.shape[2:]), np.float32)
    targets = [ClassifierOutputTarget(int(k)) for k in classes]
    with network.single_view():
        layer, transform = _find_target_layer(network, tiles_NCHW[:1])
        with GradCAMPlusPlus(network, [layer], reshape_transform=transform) as cam:
            heat: npt.NDArray[np.float32] = cam(tiles_NCHW, targets)
    return heat


def _find_target_layer(network: "Network", tile_NCHW: "Tensor") -> tuple["nn.Module", Any]:
    """The last layer that keeps the places apart, and what makes (N, C, h, w) of its output."""
    backbone: Any = network.backbone
    if hasattr(backbone, "patch_embed") and hasattr(backbone, "blocks"):
        height, width = backbone.patch_embed.grid_size
        prefix = getattr(backbone, "num_prefix_tokens", 0)

        def places(tokens: "Tensor") -> "Tensor":
            batch, _, channels = tokens.shape
            grid = tokens[:, prefix:].reshape(batch, height, width, channels)
            return grid.permute(0, 3, 1, 2)

        return backbone.blocks[-1].norm1, places
    found: list[nn.Module] = []

    channels_last = "NHWC" in str(getattr(backbone, "output_fmt", "NCHW"))  # as timm's Swin
    height, width = (1, 2) if channels_last else (2, 3)

    def look(module: "nn.Module", _: Any, output: Any) -> None:
        is_map = isinstance(output, torch.Tensor) and output.ndim == 4
        if is_map and min(output.shape[height], output.shape[width]) >= MIN_MAP_SIDE:
            found.append(module)

    hooks = [module.register_forward_hook(look) for module in backbone.modules()]
    try:
        with torch.inference_mode():
            network(tile_NCHW)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise ModelError(
            f"{network.spec.name} has no feature map of at least {MIN_MAP_SIDE}x{MIN_MAP_SIDE} to "
            "explain: use a convolutional network or a vision transformer"
        )
    return found[-1], _channels_first if channels_last else None


def _channels_first(map_NHWC: "Tensor") -> "Tensor":
    return map_NHWC.permute(0, 3, 1, 2)


def gallery(
    network: "Network",
    tiles_NHWC: Tiles,
    names: Sequence[str],
    labels: npt.NDArray[np.int64],
    probabilities: npt.NDArray[np.float64],
) -> list[CamResult]:
    """The tiles of the highest loss, then of each class the right one of the lowest."""
    loss = per_tile_nll(labels, probabilities)
    right = probabilities.argmax(axis=1) == labels
    hardest = np.argsort(-loss, kind="stable")[:MAX_HARDEST]
    surest = [
        min(found, key=lambda n: loss[n])
        for k in range(len(network.spec.classes))
        if len(found := np.flatnonzero(right & (labels == k)))
    ]
    chosen = np.asarray([*hardest, *surest])
    expected = [network.spec.classes[int(labels[n])] for n in chosen]
    return explain(network, tiles_NHWC[chosen], [names[n] for n in chosen], expected)


def draw_page(results: Sequence[CamResult], title: str, file: Path) -> None:
    """A page as a picture: tile, heat of the label, heat of the true class where it differs."""
    columns = 2
    lines = -(-len(results) // columns)
    figure = Figure(figsize=(5.4 * columns, 2.0 * lines + 0.4), layout="constrained")
    grid = figure.subplots(lines, 3 * columns, squeeze=False)
    for axes in grid.ravel():
        axes.set_axis_off()
    for number, one in enumerate(results):
        left = 3 * (number % columns)
        shown, label, other = grid[number // columns, left : left + 3]
        shown.imshow(visible(one.pixels_HWC), cmap="gray")
        shown.set_title(_shortened(one.tile), fontsize=7)
        for axes, heat, name in (
            (label, one.heat, f"{one.label} {one.confidence:.3f}"),
            (other, one.heat_expected, f"true: {one.expected}"),
        ):
            if heat is not None:
                axes.imshow(visible(one.pixels_HWC), cmap="gray")
                axes.imshow(heat, cmap="inferno", alpha=0.5, vmin=0, vmax=1)
                wrong = one.expected not in (None, one.label)
                axes.set_title(name, fontsize=7, color="firebrick" if wrong else "black")
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=DPI)


def _shortened(name: str) -> str:
    return Path(name).name[-28:]


def render_html(results: Sequence[CamResult], title: str) -> str:
    """The same as HTML that needs no other file."""
    rows = "\n".join(
        f"<tr><td>{html.escape(one.tile)}</td><td>{html.escape(one.expected or '-')}</td>"
        f"<td>{html.escape(one.label)}</td><td>{one.confidence:.4f}</td>"
        f"<td>{_pictures(one)}</td></tr>"
        for one in results
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>body {{ font: 14px sans-serif; margin: 2em }}
td, th {{ padding: .3em 1em; text-align: left }}
img {{ width: 128px; image-rendering: pixelated; margin-right: 4px }}</style>
<h1>{html.escape(title)}</h1>
<p>Tile, what spoke for the label, and what spoke for the true class where that is another
(Grad-CAM++: bright is strong).</p>
<table><tr><th>tile</th><th>true</th><th>label</th><th>confidence</th><th></th></tr>
{rows}
</table></html>
"""


def _pictures(one: CamResult) -> str:
    heats = [None, one.heat] + ([] if one.heat_expected is None else [one.heat_expected])
    return "".join(_inline_png(one.pixels_HWC, heat) for heat in heats)


def _inline_png(pixels_HWC: Tiles, heat: npt.NDArray[np.float32] | None) -> str:
    """An inline PNG of the tile, under its heat where that is given."""
    pixels = visible(pixels_HWC).astype(np.float32)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    if heat is not None:
        pixels = 0.5 * pixels + 127.5 * colormaps["inferno"](heat)[:, :, :3].astype(np.float32)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
