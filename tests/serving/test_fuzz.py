"""The decoder of the served model, with randomly damaged files."""

import random

import numpy as np
import psutil
import pytest

from tests.support.images import encoded
from tests.support.malformed_requests import flipped
from tests.support.registry import MLFLOW_WARNS

pytestmark = MLFLOW_WARNS

NUM_FILES = 2000
NUM_FILES_LONG = 100_000
FUZZ_GROWTH_MB = 24.0
SHAPE = (64, 64, 3)
SEEDS = [
    encoded("Forest", kind, size, mode)
    for kind in ("JPEG", "PNG", "TIFF")
    for size, mode in ((64, "RGB"), (64, "L"), (90, "RGB"), (64, "CMYK"), (64, "RGBA"), (64, "P"))
    if (kind, mode) not in {("JPEG", "RGBA"), ("JPEG", "P"), ("PNG", "CMYK")}
]
"""Valid files that are mutated."""


def mutated(chance: random.Random) -> bytes:
    """Return a file with bytes changed, inserted, removed, repeated, or from another file."""
    data = bytearray(chance.choice(SEEDS))
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = int(len(data) * chance.random() ** chance.choice((1, 3)))  # heads matter most
        size = chance.choice((1, 2, 4, 64))
        match chance.randrange(7):
            case 0:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                data[at : at + size] = chance.randbytes(size)
            case 2:
                data[at:at] = chance.randbytes(size)
            case 3:
                del data[at : at + size]
            case 4:
                data[at : at + size] = data[at : at + size] * chance.randrange(2, 9)
            case 5:
                data[at : at + size] = chance.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * size
            case 6:
                other = chance.choice(SEEDS)
                data[at:] = other[min(at, len(other)) :]
    return bytes(data)


def fuzz(count: int, seed: int) -> dict[str, int]:
    """Return how many files were decoded and rejected."""
    from serving.pyfunc import InvalidTile, _decode

    chance = random.Random(seed)
    counts, messages = {"decoded": 0, "rejected": 0}, set()
    for number in range(count):
        data = mutated(chance)
        try:
            tile = _decode(data, SHAPE, None).tile_HWC
        except InvalidTile as error:
            counts["rejected"] += 1
            messages.add(str(error))
        except Exception as error:  # noqa: BLE001 - any other exception is a fault
            pytest.fail(f"file {number} of seed {seed}: {error!r}")
        else:
            counts["decoded"] += 1
            assert tile.shape == SHAPE, f"file {number} of seed {seed}"
            assert tile.dtype == np.uint8, f"file {number} of seed {seed}"
    assert all(0 < len(message) < 300 for message in messages)
    return counts


def fuzz_in_constant_memory(count: int) -> dict[str, int]:
    fuzz(count // 4, seed=1)  # loads modules and fills caches
    before = psutil.Process().memory_info().rss
    counts = fuzz(count, seed=0)
    assert (psutil.Process().memory_info().rss - before) / 1e6 < FUZZ_GROWTH_MB
    return counts


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
def test_the_decoder_decodes_or_rejects_any_file() -> None:
    counts = fuzz_in_constant_memory(NUM_FILES)
    assert counts["decoded"] > NUM_FILES / 50, "the mutations are too rough"
    assert counts["rejected"] > NUM_FILES / 50


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
def test_the_decoder_decodes_or_rejects_any_of_many_files() -> None:
    fuzz_in_constant_memory(NUM_FILES_LONG)


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_a_damaged_geotiff_is_decoded_or_rejected() -> None:
    """GDAL decodes tiles of more than three bands."""
    from rasterio.io import MemoryFile

    from serving.pyfunc import InvalidTile, _decode

    with MemoryFile() as file:
        with file.open(
            driver="GTiff", width=16, height=16, count=13, dtype="uint8", compress="deflate"
        ) as tiff:
            tiff.write(np.arange(13 * 256, dtype=np.uint8).reshape(13, 16, 16))
        good = file.read()
    decoded = 0
    for seed in range(200):
        try:
            tile = _decode(flipped(good, seed), (16, 16, 13), None).tile_HWC
        except InvalidTile:
            continue
        decoded += 1
        assert tile.shape == (16, 16, 13)
        assert tile.dtype == np.uint8
    assert 0 < decoded < 200
