"""Building blocks of synthetic scenes: colours, noise, parcels of land and winding lines.

Lengths are in ground units of 10 m, one Sentinel-2 pixel. Images have shape (3, size, size),
fields of one value have shape (size, size).
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Rng = np.random.Generator

EXTENT = 64.0
"""Side of a tile, in ground units of 10 m."""


def rgb(red: int, green: int, blue: int) -> Floats:
    """Return a colour of shape (3, 1, 1), which broadcasts over an image."""
    return np.array([red, green, blue], dtype=np.float64).reshape(3, 1, 1)


# 8-bit RGB, measured on EuroSAT's own tiles, 200 per class: the mean of a class where the comment
# says so, else a typical patch.
PALE_SOIL = rgb(218, 162, 132)
DARK_SOIL = rgb(104, 92, 98)
CROP = rgb(52, 90, 80)
WOOD = rgb(40, 64, 77)  # mean of Forest
MEADOW = rgb(63, 93, 89)
SCRUB = rgb(66, 78, 80)
DRY_GRASS = rgb(140, 122, 114)
ASPHALT = rgb(98, 100, 114)
CONCRETE = rgb(122, 124, 134)  # mean of Industrial
TILES = rgb(150, 122, 120)
WHITE_ROOF = rgb(225, 225, 228)
DEEP_WATER = rgb(26, 48, 78)
GREEN_WATER = rgb(78, 116, 112)
SKY = rgb(112, 118, 134)
"""Colour of haze: EuroSAT's haziest tiles approach it."""


@cache
def _ground(size: int) -> Floats:
    """Return (2, size, size): x and y of every pixel's centre, relative to the tile's middle."""
    axis = ((np.arange(size) + 0.5) / size - 0.5) * EXTENT
    return np.stack(np.meshgrid(axis, axis))


@cache
def _bumps(size: int, cells: int) -> Floats:
    """Return (size, cells) Gaussian bumps, one per cell; rows have norm 1: noise of variance 1."""
    at = (np.arange(size)[:, None] + 0.5) / size * cells - 0.5
    weights = np.exp(-(((at - np.arange(cells)) / 0.65) ** 2) / 2)  # 0.65 hides the lattice
    scaled: Floats = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    return scaled


@cache
def blur_matrix(size: int) -> Floats:
    """Return a (size, size) Gaussian of 0.45 ground units: as sharp as edges in EuroSAT."""
    axis = _ground(size)[0, 0]
    weights = np.exp(-(((axis[:, None] - axis) / 0.45) ** 2) / 2)
    scaled: Floats = weights / weights.sum(axis=1, keepdims=True)
    return scaled


def smooth_noise(rng: Rng, size: int, cells: int) -> Floats:
    """Return (size, size) noise of mean 0 and variance 1, with ``cells`` bumps per side."""
    bumps = _bumps(size, cells)
    field: Floats = bumps @ rng.standard_normal((cells, cells)) @ bumps.T
    return field


def fractal_noise(rng: Rng, size: int, roughness: float) -> Floats:
    """Return (size, size) noise of variance 1 from octaves of 4, 12 and 36 bumps per side.

    The amplitude of each octave is ``roughness`` times that of the one before.
    """
    weights = roughness ** np.arange(3)
    octaves = [w * smooth_noise(rng, size, 4 * 3**k) for k, w in enumerate(weights)]
    total: Floats = np.sum(octaves, axis=0) / np.linalg.norm(weights)
    return total


def rotated_coordinates(rng: Rng, size: int, warp: float = 0.0) -> tuple[Floats, Floats]:
    """Return coordinates along and across a random direction, bent by about ``warp`` units."""
    x, y = _ground(size)
    if warp:
        x, y = x + warp * smooth_noise(rng, size, 4), y + warp * smooth_noise(rng, size, 4)
    angle = rng.uniform(0, 2 * np.pi)
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parcels:
    """Land cut into parcels like bricks: into columns, and each column into pieces."""

    id: npt.NDArray[np.intp]
    """Number of the parcel at each pixel."""
    count: int
    edge: Floats
    """Distance to the nearest border, in ground units."""
    across: Floats
    """Coordinate across the columns, in ground units."""
    along: Floats
    """Coordinate along the columns, in ground units."""

    def spread(self, values: Floats) -> Floats:
        """Return an image field in which parcel i has ``values[i]``; there are ``count`` values."""
        return values[self.id]

    def random_subset(self, rng: Rng, share: float) -> Floats:
        """Return a field that is 1 in a random ``share`` of the parcels, 0 in the others."""
        return self.spread((rng.random(self.count) < share).astype(np.float64))


def _cut_pieces(rng: Rng, at: Floats, pitch: float) -> tuple[npt.NDArray[np.intp], int, Floats]:
    """Cut a line about every ``pitch`` ground units.

    Returns the number of the piece at each coordinate ``at``, an upper bound on the number of
    pieces, and the distance to the nearest cut.
    """
    count = int(1.2 * (2 * EXTENT / pitch + 4))  # enough for a rotated, bent and shifted tile
    cuts = -EXTENT - pitch + np.cumsum(pitch * rng.uniform(0.6, 1.4, count))
    piece = np.searchsorted(cuts, at).clip(1, count - 1)
    return piece, count, np.minimum(at - cuts[piece - 1], cuts[piece] - at)


def make_parcels(rng: Rng, size: int, width: float, length: float, warp: float = 0.0) -> Parcels:
    """Cut a tile into parcels of about ``width`` x ``length`` ground units, bent by ``warp``."""
    across, along = rotated_coordinates(rng, size, warp)
    column, columns, side = _cut_pieces(rng, across, width)
    along = along + rng.uniform(0, length, columns)[column]
    row, rows, end = _cut_pieces(rng, along, length)
    return Parcels(
        id=column * rows + row,
        count=columns * rows,
        edge=np.minimum(side, end),
        across=across,
        along=along,
    )


def winding_line(rng: Rng, size: int, bend: float) -> Floats:
    """Return the signed distance to a winding line that passes near the middle of the tile."""
    along, across = rotated_coordinates(rng, size)
    turn, phase = 2 * np.pi / rng.uniform(50, 130), rng.uniform(0, 2 * np.pi)
    bend *= rng.uniform(0.2, 1)
    offset = across - rng.uniform(-14, 14) - bend * np.sin(turn * along + phase)
    slope = bend * turn * np.cos(turn * along + phase)
    distance: Floats = offset / np.sqrt(1 + slope**2)
    return distance


def mix(a: Floats, b: Floats, share: Floats | float) -> Floats:
    """Blend two images: ``a`` where ``share`` is 0, ``b`` where it is 1; shares are clipped."""
    mixed: Floats = a + (b - a) * np.clip(share, 0, 1)
    return mixed


def line_mask(distance: Floats, half_width: float) -> Floats:
    """Return a soft mask: 1 within ``half_width`` of a line, 0 one ground unit further away."""
    return (half_width + 0.5 - np.abs(distance)).clip(0, 1)


def colour_shift(rng: Rng, spread: float) -> Floats:
    """Return a random shift of colour, twice as large in blue: EuroSAT's white balance varies."""
    return rng.normal(0, spread, (3, 1, 1)) * rgb(1, 1, 2)
