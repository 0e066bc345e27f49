"""Thirteen bands: read whole, scaled band by band, trained on."""

from pathlib import Path

import numpy as np
import pytest

from eurosat import tracking, train
from eurosat.config import compose
from eurosat.data import bands
from eurosat.data.decode import decode
from eurosat.data.loaders import band_statistics
from eurosat.data.pack import open_pack
from eurosat.data.prepare import prepare
from eurosat.errors import DataError
from eurosat.models.network import save
from eurosat.models.pretrained import create
from tests.support.recipes import TINY

MANY = ("data.dtype=uint16", "data.synthetic.bands=13")


def test_every_band_has_its_own_scale_and_cirrus_stays_dark() -> None:
    values = np.tile(np.array(bands.MEANS), (4, 4, 1)).astype(np.uint16)
    pixels = decode(bands.encode_geotiff(values), "t.tif", dtype="uint16", reflectance_max=None)[
        0, 0
    ]
    levels = dict(zip(bands.NAMES, pixels.tolist(), strict=True))
    assert levels.pop(bands.CIRRUS) <= 2
    assert all(60 < level < 200 for level in levels.values()), levels
    assert levels["B04"] == round(947 / 2750 * 255)
    one = decode(bands.encode_geotiff(values), "t.tif", dtype="uint16", reflectance_max=2750)[0, 0]
    assert one[bands.NAMES.index("B08")] > levels["B08"]


def test_the_colours_of_thirteen_bands_are_red_green_and_blue() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    file = bands.encode_geotiff(bands.bands_from_rgb(picture, np.random.default_rng(1)))
    seen = decode(file, "t.tif", dtype="uint16", reflectance_max=None, bands="rgb")
    np.testing.assert_allclose(seen.astype(int), picture, atol=1)
    four = bands.encode_geotiff(np.ones((8, 8, 4), np.uint16))
    with pytest.raises(DataError, match="t.tif has 4 bands, .*say data.bands=all"):
        decode(four, "t.tif", dtype="uint16", reflectance_max=None, bands="rgb")


@pytest.mark.usefixtures("tracking_store")
def test_thirteen_bands_are_trained_from_weights_of_three_colours(tmp_path: Path) -> None:
    config = compose([*TINY, *MANY])
    data = prepare(config)
    assert data.pack.tiles_NHWC.shape[1:] == (32, 32, 13)
    mean, std = band_statistics(data.pack, data.split.indices("train"))
    assert std[bands.NAMES.index(bands.CIRRUS)] == 1, "a floor: its noise is not made large"
    colour = create(
        config.model,
        "none",
        classes=data.pack.classes,
        bands=3,
        tile_size=(32, 32),
        mean=mean[:3],
        std=std[:3],
    )
    save(colour, tmp_path / "rgb.safetensors")
    config = compose([*TINY, *MANY, f"weights={tmp_path / 'rgb.safetensors'}"])
    with tracking.run("e", "r", system_metrics=False) as run:
        tested = train.train(config, data, run)
    assert 0 <= tested["test_accuracy"] <= 1
    assert tracking.get(run.run_id).params["data.bands"] == "all"


@pytest.mark.real_data
@pytest.mark.parametrize(("said", "count"), [("all", 13), ("rgb", 3)])
def test_the_genuine_tiles_of_thirteen_bands_are_read(
    eurosat_root: Path, tmp_path: Path, said: str, count: int
) -> None:
    folder = eurosat_root / "EuroSAT_MS_sample"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: the multispectral sample is not here")
    pack = open_pack(
        compose(
            [
                "data=folder",
                f"data.root={folder}",
                "data.dtype=uint16",
                f"data.bands={said}",
                f"data.cache={tmp_path}",
            ]
        ).data
    )
    assert pack.bands == count
    assert len(pack.table) == len(list(folder.rglob("*.tif")))
    spread = pack.tiles_NHWC.reshape(-1, count).std(axis=0)
    lively = [n for n, name in enumerate(bands.NAMES) if name != bands.CIRRUS]
    assert (spread[lively if count > 3 else slice(None)] > 2).all()
