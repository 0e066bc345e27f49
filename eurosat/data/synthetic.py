"""Procedural look-alikes of EuroSAT's RGB tiles: a data set that needs no download.

A tile shows 640 m x 640 m, as in EuroSAT; ``size`` only says how finely it is sampled.
Lengths are in ground units of 10 m, one Sentinel-2 pixel. Colours are 8-bit RGB, read off
EuroSAT's own tiles, 200 per class: a class's mean colour where the comment says "mean", a
typical patch elsewhere. The ranges of widths, bends and textures were set by eye, beside
EuroSAT's tiles, until mean, spread and pixel-to-pixel steps were alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from eurosat.errors import ConfigError

Floats = npt.NDArray[np.float64]
Rng = np.random.Generator

EXTENT = 64.0
"""Side of a tile, in ground units of 10 m."""
SIZES = (16, 256)
"""Pixels a side: fewer show no texture, more show the splines that the texture is made of."""


def _rgb(red: int, green: int, blue: int) -> Floats:
    """A colour of shape (3, 1, 1), to be spread over an image of shape (3, size, size)."""
    return np.array([red, green, blue], dtype=np.float64).reshape(3, 1, 1)


PALE_SOIL = _rgb(218, 162, 132)
DARK_SOIL = _rgb(104, 92, 98)
CROP = _rgb(52, 90, 80)
WOOD = _rgb(40, 64, 77)  # mean of Forest
MEADOW = _rgb(63, 93, 89)
SCRUB = _rgb(66, 78, 80)
DRY_GRASS = _rgb(140, 122, 114)
ASPHALT = _rgb(98, 100, 114)
CONCRETE = _rgb(122, 124, 134)  # mean of Industrial
TILES = _rgb(150, 122, 120)
WHITE_ROOF = _rgb(225, 225, 228)
DEEP_WATER = _rgb(26, 48, 78)
GREEN_WATER = _rgb(78, 116, 112)
SKY = _rgb(112, 118, 134)
"""What haze adds: the colour that EuroSAT's haziest tiles tend to."""


@cache
def _ground(size: int) -> Floats:
    """(2, size, size): x and y of every pixel's centre, the tile's middle being the origin."""
    axis = ((np.arange(size) + 0.5) / size - 0.5) * EXTENT
    return np.stack(np.meshgrid(axis, axis))


@cache
def _bumps(size: int, cells: int) -> Floats:
    """(size, cells) Gaussian bumps one cell apart; rows of unit norm keep noise at variance 1."""
    at = (np.arange(size)[:, None] + 0.5) / size * cells - 0.5
    weights = np.exp(-(((at - np.arange(cells)) / 0.65) ** 2) / 2)  # 0.65: no lattice to be seen
    scaled: Floats = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    return scaled


@cache
def _blur(size: int) -> Floats:
    """(size, size) matrix: a Gaussian of 0.45 ground units, the sharpness of EuroSAT's edges."""
    axis = _ground(size)[0, 0]
    weights = np.exp(-(((axis[:, None] - axis) / 0.45) ** 2) / 2)
    scaled: Floats = weights / weights.sum(axis=1, keepdims=True)
    return scaled


def _noise(rng: Rng, size: int, cells: int) -> Floats:
    """Smooth noise of mean 0 and variance 1, ``cells`` bumps a side."""
    bumps = _bumps(size, cells)
    field: Floats = bumps @ rng.standard_normal((cells, cells)) @ bumps.T
    return field


def _fractal(rng: Rng, size: int, roughness: float) -> Floats:
    """Noise of variance 1: octaves of 4, 12 and 36 bumps, each ``roughness`` times the last."""
    weights = roughness ** np.arange(3)
    octaves = [w * _noise(rng, size, 4 * 3**k) for k, w in enumerate(weights)]
    total: Floats = np.sum(octaves, axis=0) / np.linalg.norm(weights)
    return total


def _rotated(rng: Rng, size: int, warp: float = 0.0) -> tuple[Floats, Floats]:
    """Coordinates along and across a random direction, bent by about ``warp`` ground units."""
    x, y = _ground(size)
    if warp:
        x, y = x + warp * _noise(rng, size, 4), y + warp * _noise(rng, size, 4)
    angle = rng.uniform(0, 2 * np.pi)
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parcels:
    """Land cut into bricks: columns across one direction, each cut anew along it."""

    id: npt.NDArray[np.intp]
    count: int
    edge: Floats
    """Distance to the nearest border, in ground units."""
    across: Floats
    along: Floats

    def spread(self, values: Floats) -> Floats:
        """Give each parcel one of ``values``, of length ``count``."""
        return values[self.id]

    def random_subset(self, rng: Rng, share: float) -> Floats:
        """1 in a random ``share`` of the parcels, 0 in the others."""
        return self.spread((rng.random(self.count) < share).astype(np.float64))


def _cut_pieces(rng: Rng, at: Floats, pitch: float) -> tuple[npt.NDArray[np.intp], int, Floats]:
    """Cut a line about every ``pitch``.

    Returns the piece at each of ``at``, a bound on the pieces, the distance to the nearest cut.
    """
    count = int(1.2 * (2 * EXTENT / pitch + 4))  # ample for a turned, bent and shifted tile
    cuts = -EXTENT - pitch + np.cumsum(pitch * rng.uniform(0.6, 1.4, count))
    piece = np.searchsorted(cuts, at).clip(1, count - 1)
    return piece, count, np.minimum(at - cuts[piece - 1], cuts[piece] - at)


def _parcels(rng: Rng, size: int, width: float, length: float, warp: float = 0.0) -> Parcels:
    across, along = _rotated(rng, size, warp)
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


def _path(rng: Rng, size: int, bend: float) -> Floats:
    """Signed distance to a winding line that passes near the middle of the tile."""
    along, across = _rotated(rng, size)
    turn, phase = 2 * np.pi / rng.uniform(50, 130), rng.uniform(0, 2 * np.pi)
    bend *= rng.uniform(0.2, 1)
    offset = across - rng.uniform(-14, 14) - bend * np.sin(turn * along + phase)
    slope = bend * turn * np.cos(turn * along + phase)
    distance: Floats = offset / np.sqrt(1 + slope**2)
    return distance


def _mix(a: Floats, b: Floats, share: Floats | float) -> Floats:
    """``a`` where ``share`` is 0, ``b`` where it is 1; shares outside [0, 1] are clipped."""
    mixed: Floats = a + (b - a) * np.clip(share, 0, 1)
    return mixed


def _line_mask(distance: Floats, half_width: float) -> Floats:
    """1 within ``half_width`` of a line, 0 a ground unit further: a soft pen."""
    return (half_width + 0.5 - np.abs(distance)).clip(0, 1)


def _tint(rng: Rng, spread: float) -> Floats:
    """A random shift of colour, blue's twice as large: EuroSAT's white balance wanders."""
    return rng.normal(0, spread, (3, 1, 1)) * _rgb(1, 1, 2)


def _fields(rng: Rng, parcels: Parcels, green: float, spread: float) -> Floats:
    """Colour parcels from soil to crop, ``green`` being the mean share of crop."""
    soil = _mix(DARK_SOIL, PALE_SOIL, rng.beta(0.7, 0.7))
    cover = parcels.spread(rng.normal(green, spread, parcels.count))
    light = parcels.spread(rng.normal(1, 0.1, parcels.count))
    return _mix(soil, CROP, cover) * light


def _annual_crop(rng: Rng, size: int) -> Floats:
    width = rng.uniform(20, 42)
    parcels = _parcels(rng, size, width, width * rng.uniform(1, 2.2), rng.uniform(0, 2))
    image = _fields(rng, parcels, rng.uniform(-0.2, 0.55), 0.55)
    tilled = np.sin(parcels.across * 2 * np.pi / rng.uniform(4, 9))  # tracks of the machines
    image *= 1 + rng.uniform(0, 0.04) * tilled + 0.04 * _fractal(rng, size, 0.9)
    return _mix(image, DRY_GRASS, rng.uniform(-0.5, 0.7) * _line_mask(parcels.edge, 0.2))


def _forest(rng: Rng, size: int) -> Floats:
    crowns = rng.uniform(0.05, 0.11) * _fractal(rng, size, rng.uniform(1.0, 2.5))
    wood = (WOOD + _tint(rng, 3)) * (1 + crowns)
    clearing = (_noise(rng, size, 6) - rng.uniform(1.6, 4)) * 2
    return _mix(wood, MEADOW, 0.6 * clearing.clip(0, 1))


def _herbaceous(rng: Rng, size: int) -> Floats:
    base = _mix(SCRUB, DRY_GRASS, rng.beta(0.9, 0.6)) + _tint(rng, 5)
    bushes = 0.5 + 0.4 * _fractal(rng, size, rng.uniform(0.5, 1.0))
    folds = _noise(rng, size, 9) + 0.6 * _noise(rng, size, 26)
    relief = 0.8 - np.abs(folds) + 0.4 * _noise(rng, size, 48)  # ridges where the folds cross 0
    image = _mix(base, SCRUB, rng.uniform(0, 0.8) * bushes) * (1 + rng.uniform(0.1, 0.3) * relief)
    scree = _noise(rng, size, 6) + 0.7 * _noise(rng, size, 40) - rng.uniform(1.4, 5)
    return _mix(image, 1.3 * DRY_GRASS, 0.7 * scree)


def _highway(rng: Rng, size: int) -> Floats:
    image = _land(rng, size)
    road = _mix(1.05 * ASPHALT, 1.25 * CONCRETE, rng.random())
    for half_width in (rng.uniform(1.6, 3.0), *rng.uniform(0.3, 0.9, rng.integers(0, 3))):
        line = _path(rng, size, 9)
        image = _mix(image, WOOD, 0.6 * _line_mask(line, half_width + 1.5))  # the verge
        image = _mix(image, road, _line_mask(line, half_width))
        if half_width > 2:
            image = _mix(image, WOOD, 0.6 * _line_mask(line, 0.0))  # the central reservation
    return image


def _industrial(rng: Rng, size: int) -> Floats:
    plots = _parcels(rng, size, rng.uniform(9, 17), rng.uniform(12, 26))
    yard = rng.uniform(0.6, 0.95) * _mix(ASPHALT, CONCRETE, rng.random())
    clutter = 0.12 * _noise(rng, size, 20) + 0.14 * _noise(rng, size, 56)  # lorries, trees
    image = _mix(yard * (1 + clutter), CROP, 0.9 * plots.random_subset(rng, 0.15))
    built = plots.random_subset(rng, rng.uniform(0.55, 0.9))
    inner = plots.edge - plots.spread(rng.uniform(0.8, 3.5, plots.count))
    bays = plots.spread(rng.uniform(0, 0.15, plots.count))
    bays *= np.sign(np.sin(plots.along * 2 * np.pi / rng.uniform(4, 9)))
    roof = _mix(0.9 * ASPHALT, WHITE_ROOF, bays + plots.spread(rng.beta(0.7, 0.6, plots.count)))
    return _mix(image, roof, built * inner)


def _pasture(rng: Rng, size: int) -> Floats:
    meadows = _parcels(rng, size, rng.uniform(16, 40), rng.uniform(20, 50), rng.uniform(1, 4))
    lush = meadows.spread(rng.normal(0.98, 0.08, meadows.count)) + 0.04 * _fractal(rng, size, 0.8)
    image = (MEADOW + _tint(rng, 5)) * lush
    image = _mix(image, DARK_SOIL, 0.6 * meadows.random_subset(rng, 0.1))
    hedge = _line_mask(meadows.edge, 0.5) * (_noise(rng, size, 14) > rng.uniform(-1.5, 0.5))
    trees = (_noise(rng, size, 28) - rng.uniform(1.8, 3.5)) * 2
    return _mix(image, 0.75 * WOOD, 0.8 * np.maximum(hedge, trees))


def _permanent_crop(rng: Rng, size: int) -> Floats:
    width = rng.uniform(6, 14)
    plots = _parcels(rng, size, width, width * rng.uniform(1.3, 3.5), rng.uniform(0, 3))
    image = _fields(rng, plots, rng.uniform(0.0, 0.8), 0.3)
    pitch = 2 * np.pi / rng.uniform(2.4, 4.0)
    rows = np.sin(plots.across * pitch)
    orchard = plots.random_subset(rng, 0.5) > 0
    rows = np.where(orchard, rows * np.sin(plots.along * pitch), rows)  # dots in rows
    image *= 1 + rng.uniform(0.09, 0.18) * rows + 0.05 * _fractal(rng, size, 1.5)
    return _mix(image, DRY_GRASS, rng.uniform(-0.3, 0.8) * _line_mask(plots.edge, 0.2))


def _residential(rng: Rng, size: int) -> Floats:
    houses = _parcels(rng, size, rng.uniform(2.4, 4), rng.uniform(2.6, 5), rng.uniform(0, 4))
    garden = _mix(WOOD, DARK_SOIL, rng.beta(0.8, 1.0))
    image = garden * (1 + 0.12 * _fractal(rng, size, 2.0))
    roof = _mix(0.9 * CONCRETE, TILES, rng.beta(0.7, 0.7)) * rng.uniform(0.9, 1.15)
    light = houses.spread(rng.normal(1, 0.22, houses.count).clip(0.6, 1.8))
    dense = rng.uniform(0.35, 0.85) + 0.15 * _noise(rng, size, 4)
    built = houses.spread(rng.random(houses.count)) < dense
    image = _mix(image, roof * light, built * (houses.edge + 0.1))
    blocks = _parcels(rng, size, rng.uniform(9, 18), rng.uniform(14, 34), rng.uniform(0, 4))
    return _mix(image, ASPHALT * rng.uniform(0.8, 1.2), 0.8 * _line_mask(blocks.edge, 0.1))


def _river(rng: Rng, size: int) -> Floats:
    half_width = rng.uniform(5, 14)
    line = _path(rng, size, 12) + 0.5 * _noise(rng, size, 16)
    image = _mix(_land(rng, size), WOOD, 0.7 * _line_mask(line, half_width + rng.uniform(1, 4)))
    image = _mix(image, DRY_GRASS, rng.uniform(0, 1) * _line_mask(line, half_width + 0.7))  # sand
    return _mix(image, _water(rng, size, 0.45), _line_mask(line, half_width))


def _sea_lake(rng: Rng, size: int) -> Floats:
    image = _water(rng, size, 1)
    if rng.random() < 0.1:  # a strip of shore
        image = _mix(image, WOOD, _path(rng, size, 4) - 34)
    return image


def _water(rng: Rng, size: int, greenest: float) -> Floats:
    colour = _mix(DEEP_WATER, GREEN_WATER, greenest * rng.beta(0.5, 1.3)) + _tint(rng, 4)
    return colour + 1.2 * _noise(rng, size, 3) + 0.3 * _noise(rng, size, 32)


def _land(rng: Rng, size: int) -> Floats:
    """What a road or a river runs through: fields, at times with a village or a wood."""
    image = _pasture(rng, size) if rng.random() < 0.5 else _annual_crop(rng, size)
    if rng.random() < 0.5:
        patch = _residential(rng, size) if rng.random() < 0.6 else _forest(rng, size)
        image = _mix(image, patch, 2 * (_noise(rng, size, 3) - rng.uniform(0.3, 1.2)))
    return image


SCENES: dict[str, Callable[[Rng, int], Floats]] = {
    "AnnualCrop": _annual_crop,
    "Forest": _forest,
    "HerbaceousVegetation": _herbaceous,
    "Highway": _highway,
    "Industrial": _industrial,
    "Pasture": _pasture,
    "PermanentCrop": _permanent_crop,
    "Residential": _residential,
    "River": _river,
    "SeaLake": _sea_lake,
}
CLASSES: tuple[str, ...] = tuple(SCENES)
CONFUSABLE_PAIRS = (
    ("AnnualCrop", "PermanentCrop"),
    ("PermanentCrop", "HerbaceousVegetation"),
    ("HerbaceousVegetation", "Pasture"),
    ("Pasture", "Forest"),
    ("Forest", "SeaLake"),
    ("SeaLake", "River"),
    ("River", "Highway"),
    ("Highway", "AnnualCrop"),
    ("Residential", "Industrial"),
)
"""Pairs that share tiles: a tile of one may be a mosaic of both, or a blend."""
AMBIGUOUS_SHARE = 0.10
"""Share of such tiles at difficulty 1: a ResNet-18 trained on 3,000 tiles then ends near 95 %."""


def _mix_in_confusable_class(rng: Rng, image: Floats, label: int, difficulty: float) -> Floats:
    """Mix in a confusable class, at times so much of it that the label is a coin's toss."""
    size = image.shape[-1]
    odds, pick, own, kind = rng.random(4)
    if odds >= AMBIGUOUS_SHARE * difficulty**2:
        return image
    name = CLASSES[label]
    # Every class of a pair has as many partners as the other: neither label is the better guess.
    others = [other for pair in CONFUSABLE_PAIRS if name in pair for other in pair if other != name]
    other = SCENES[others[int(pick * len(others))]](rng, size)
    share = 0.2 + 0.4 * own  # of the other class; above 0.4 the label cannot be told
    if kind < 0.3:  # a blend; else a mosaic with a bent border
        return _mix(image, other, share)
    front = _rotated(rng, size, 4)[0]
    return _mix(image, other, np.quantile(front, share) - front + 0.5)


def _apply_sensor(rng: Rng, image: Floats, difficulty: float) -> npt.NDArray[np.uint8]:
    """Season, haze, the sensor's blur and noise."""
    size = image.shape[-1]
    image = image * rng.normal(1, 0.06 + 0.03 * difficulty) * rng.normal(1, 0.02, (3, 1, 1))
    haze = rng.beta(1, 3) * (0.1 + 0.3 * difficulty) + 0.02 * _noise(rng, size, 3)
    image = _mix(image, SKY, haze)
    image = _blur(size) @ image @ _blur(size).T
    image += rng.standard_normal(image.shape) * rng.uniform(0.3, 0.5 + difficulty)
    pixels = np.moveaxis(image, 0, -1).round().clip(0, 255)
    return pixels.astype(np.uint8, order="C")


def render(
    label: int, index: int, *, seed: int = 0, size: int = 64, difficulty: float = 1.0
) -> npt.NDArray[np.uint8]:
    """Draw tile ``index`` of class ``CLASSES[label]``: (size, size, 3) RGB, the same every time.

    ``difficulty``, in [0, 2], adds haze, noise and ambiguous tiles; 0 leaves out the last. The
    scene under them depends on ``seed``, ``label`` and ``index`` alone.

    Raises:
        ConfigError: an argument is out of range.
    """
    _check_range("label", label, 0, len(CLASSES) - 1)
    _check_range("index", index, 0, np.inf)
    _check_range("seed", seed, 0, np.inf)
    _check_range("size", size, *SIZES)
    _check_range("difficulty", difficulty, 0, 2)
    scene, mixture, exposure = (np.random.default_rng([seed, label, index, k]) for k in range(3))
    image = SCENES[CLASSES[label]](scene, size)
    image = _mix_in_confusable_class(mixture, image, label, difficulty)
    return _apply_sensor(exposure, image, difficulty)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses NaN
        raise ConfigError(f"{name} of a synthetic tile is in [{low}, {high}]; got {value}")
