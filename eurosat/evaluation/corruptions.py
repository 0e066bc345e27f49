"""Corrupt tiles as weather, sensors and compression do, in five severities.

Modelled on ImageNet-C (Hendrycks & Dietterich 2019), with corruptions of satellite images: haze,
missing lines, the light of another season. Each takes and returns (N, H, W, C) uint8 tiles with
any number of bands, and gives the same result for the same seed.
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Tiles = npt.NDArray[np.uint8]

SEVERITIES = (1, 2, 3, 4, 5)
HAZE_SHARE = (0.1, 0.2, 0.3, 0.45, 0.6)
"""Largest share of a pixel that the haze replaces."""
HAZE_LEVEL = 225.0
"""Grey level of the haze: near white."""
BLUR_SIGMA = (0.5, 0.8, 1.2, 1.7, 2.5)
"""Standard deviation in pixels."""
NOISE_SIGMA = (4.0, 8.0, 14.0, 22.0, 34.0)
"""Standard deviation in grey levels."""
JPEG_QUALITY = (40, 25, 15, 10, 6)
"""Quality of the JPEG encoder; EuroSAT's own tiles were written at about 90."""
MAX_COLOUR_CAST = (0.05, 0.1, 0.15, 0.22, 0.3)
"""Largest relative change of a band's brightness."""
MISSING_LINES_SHARE = (0.02, 0.05, 0.1, 0.2, 0.35)
"""Share of the rows that have no data."""
SEASON_DIMMING = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Share of the light that is lost under a lower sun; the first band loses less than the last."""
RESOLUTION_SCALE = (0.75, 0.5, 0.375, 0.25, 0.125)
"""Height and width of the coarse image, as a share of the tile's."""


def haze(tiles: Tiles, severity: int, rng: np.random.Generator) -> Tiles:
    """Add bright haze that is thicker on one side."""
    slope = np.linspace(0.5, 1, tiles.shape[2])
    flipped = np.where(rng.random(len(tiles)) < 0.5, -1, 1)
    thickness = np.stack([slope[::step] for step in flipped])[:, None, :, None]
    share = HAZE_SHARE[severity - 1] * thickness
    return _to_uint8(tiles * (1 - share) + HAZE_LEVEL * share)


def blur(tiles: Tiles, severity: int, _: np.random.Generator) -> Tiles:
    from scipy.ndimage import gaussian_filter

    sigma = BLUR_SIGMA[severity - 1]
    smooth = gaussian_filter(tiles.astype(np.float32), (0, sigma, sigma, 0), mode="nearest")
    return _to_uint8(smooth)


def noise(tiles: Tiles, severity: int, rng: np.random.Generator) -> Tiles:
    return _to_uint8(tiles + rng.normal(0, NOISE_SIGMA[severity - 1], tiles.shape))


def jpeg(tiles: Tiles, severity: int, _: np.random.Generator) -> Tiles:
    """Compress tiles of three bands as RGB, and the bands of any others each as a grey image."""
    from PIL import Image

    def compress(image: Tiles) -> Tiles:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=JPEG_QUALITY[severity - 1])
        return np.array(Image.open(file, formats=["JPEG"]), dtype=np.uint8)

    if tiles.shape[3] == 3:
        return np.stack([compress(tile) for tile in tiles])
    bands = range(tiles.shape[3])
    return np.stack([np.stack([compress(tile[:, :, c]) for c in bands], axis=2) for tile in tiles])


def colour_cast(tiles: Tiles, severity: int, rng: np.random.Generator) -> Tiles:
    """Brighten or darken each band of a tile by a random factor."""
    change = MAX_COLOUR_CAST[severity - 1]
    shape = (len(tiles), 1, 1, tiles.shape[3])
    return _to_uint8(tiles * rng.uniform(1 - change, 1 + change, shape))


def missing_lines(tiles: Tiles, severity: int, rng: np.random.Generator) -> Tiles:
    """Set random rows to zero."""
    has_data = rng.random(tiles.shape[:2]) >= MISSING_LINES_SHARE[severity - 1]
    return _to_uint8(tiles * has_data[:, :, None, None].astype(np.float32))


def season(tiles: Tiles, severity: int, _: np.random.Generator) -> Tiles:
    """Imitate the light of another season: a lower sun is darker, flatter and redder."""
    loss = SEASON_DIMMING[severity - 1] * np.linspace(0.6, 1, tiles.shape[3])
    mean = tiles.mean(axis=(1, 2), keepdims=True)
    flat = mean + (tiles - mean) * (1 - SEASON_DIMMING[severity - 1] / 2)
    return _to_uint8(flat * (1 - loss))


def resolution(tiles: Tiles, severity: int, _: np.random.Generator) -> Tiles:
    """Resample down and up again, as if from a coarser sensor."""
    import torch
    from torch.nn.functional import interpolate

    full = (tiles.shape[1], tiles.shape[2])
    small = [max(1, round(side * RESOLUTION_SCALE[severity - 1])) for side in full]
    tiles_NCHW = torch.from_numpy(tiles.astype(np.float32)).permute(0, 3, 1, 2)
    coarse = interpolate(tiles_NCHW, small, mode="area")
    restored = interpolate(coarse, full, mode="bilinear", align_corners=False)
    return _to_uint8(restored.permute(0, 2, 3, 1).numpy())


KINDS: dict[str, Callable[[Tiles, int, np.random.Generator], Tiles]] = {
    function.__name__: function
    for function in (haze, blur, noise, jpeg, colour_cast, missing_lines, season, resolution)
}


def corrupt(tiles: Tiles, kind: str, severity: int, seed: int = 0) -> Tiles:
    """Apply a corruption of KINDS with a severity from 1 to 5."""
    rng = np.random.default_rng([seed, severity, list(KINDS).index(kind)])
    return KINDS[kind](tiles, severity, rng)


def _to_uint8(values: npt.NDArray[Any]) -> Tiles:
    pixels: Tiles = np.rint(np.clip(values, 0, 255)).astype(np.uint8)
    return pixels
