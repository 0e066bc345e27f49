"""The decoder of the served model, given files that were damaged at random."""

import random

import numpy as np
import psutil
import pytest

from tests.support.images import encoded
from tests.support.malformed_requests import flipped
from tests.support.registry import MLFLOW_WARNS

pytestmark = MLFLOW_WARNS

FUZZED = 2000
FUZZED_LONG = 100_000
FUZZ_GROWTH_MB = 24.0
SHAPE = (64, 64, 3)
SEEDS = [
    encoded("Forest", kind, size, mode)
    for kind in ("JPEG", "PNG", "TIFF")
    for size, mode in ((64, "RGB"), (64, "L"), (90, "RGB"), (64, "CMYK"), (64, "RGBA"), (64, "P"))
    if (kind, mode) not in {("JPEG", "RGBA"), ("JPEG", "P"), ("PNG", "CMYK")}
]
"""Files that are read, of which others are made."""


def mutated(chance: random.Random) -> bytes:
    """A file with bits flipped, bytes put in, left out, repeated, or of another file."""
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
    """How many were read and refused."""
    from serving.pyfunc import BadTile, _picture

    chance = random.Random(seed)
    told, said = {"read": 0, "refused": 0}, set()
    for number in range(count):
        data = mutated(chance)
        try:
            tile = _picture(data, SHAPE, None).tile_HWC
        except BadTile as error:
            told["refused"] += 1
            said.add(str(error))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a fault
            pytest.fail(f"file {number} of seed {seed}: {error!r}")
        else:
            told["read"] += 1
            assert tile.shape == SHAPE, f"file {number} of seed {seed}"
            assert tile.dtype == np.uint8, f"file {number} of seed {seed}"
    assert all(0 < len(why) < 300 for why in said)
    return told


def fuzzed_in_even_memory(count: int) -> dict[str, int]:
    fuzz(count // 4, seed=1)  # what is loaded and kept on the way is kept once
    before = psutil.Process().memory_info().rss
    told = fuzz(count, seed=0)
    assert (psutil.Process().memory_info().rss - before) / 1e6 < FUZZ_GROWTH_MB
    return told


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
def test_the_decoder_reads_or_refuses_whatever_it_is_given() -> None:
    told = fuzzed_in_even_memory(FUZZED)
    assert told["read"] > FUZZED / 50, "the mutations are so rough that nothing is ever decoded"
    assert told["refused"] > FUZZED / 50


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
def test_the_decoder_reads_or_refuses_whatever_it_is_given_for_long() -> None:
    fuzzed_in_even_memory(FUZZED_LONG)


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_a_geotiff_of_noise_is_read_or_refused() -> None:
    """GDAL reads the tiles of more bands than three."""
    from rasterio.io import MemoryFile

    from serving.pyfunc import BadTile, _picture

    with MemoryFile() as file:
        with file.open(
            driver="GTiff", width=16, height=16, count=13, dtype="uint8", compress="deflate"
        ) as tiff:
            tiff.write(np.arange(13 * 256, dtype=np.uint8).reshape(13, 16, 16))
        good = file.read()
    read = 0
    for seed in range(200):
        try:
            tile = _picture(flipped(good, seed), (16, 16, 13), None).tile_HWC
        except BadTile:
            continue
        read += 1
        assert tile.shape == (16, 16, 13)
        assert tile.dtype == np.uint8
    assert 0 < read < 200
