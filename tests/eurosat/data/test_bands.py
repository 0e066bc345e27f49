"""Tiles with thirteen bands: decoding, scaling, training."""

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

THIRTEEN_BANDS = ("data.dtype=uint16", "data.synthetic.bands=13")


def test_each_band_is_scaled_on_its_own_and_cirrus_stays_dark() -> None:
    values = np.tile(np.array(bands.MEANS), (4, 4, 1)).astype(np.uint16)
    file = bands.encode_geotiff(values)
    pixels = decode(file, "t.tif", dtype="uint16", reflectance_max=None)[0, 0]
    levels = dict(zip(bands.NAMES, pixels.tolist(), strict=True))
    assert levels.pop(bands.CIRRUS) <= 2
    assert all(60 < level < 200 for level in levels.values()), levels
    assert levels["B04"] == round(947 / 2750 * 255)
    one_scale = decode(file, "t.tif", dtype="uint16", reflectance_max=2750)[0, 0]
    assert one_scale[bands.NAMES.index("B08")] > levels["B08"]


def test_data_bands_rgb_selects_red_green_and_blue_of_thirteen_bands() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    file = bands.encode_geotiff(bands.bands_from_rgb(image, np.random.default_rng(1)))
    pixels = decode(file, "t.tif", dtype="uint16", reflectance_max=None, bands="rgb")
    np.testing.assert_allclose(pixels.astype(int), image, atol=1)
    four_bands = bands.encode_geotiff(np.ones((8, 8, 4), np.uint16))
    with pytest.raises(DataError, match="t.tif has 4 bands, .*set data.bands=all"):
        decode(four_bands, "t.tif", dtype="uint16", reflectance_max=None, bands="rgb")


@pytest.mark.usefixtures("tracking_store")
def test_a_network_for_thirteen_bands_starts_from_weights_for_rgb(tmp_path: Path) -> None:
    config = compose([*TINY, *THIRTEEN_BANDS])
    data = prepare(config)
    assert data.pack.tiles_NHWC.shape[1:] == (32, 32, 13)
    mean, std = band_statistics(data.pack, data.split.indices("train"))
    assert std[bands.NAMES.index(bands.CIRRUS)] == 1, "the floor of 1 keeps its noise small"
    rgb_network = create(
        config.model,
        "none",
        classes=data.pack.classes,
        bands=3,
        tile_size=(32, 32),
        mean=mean[:3],
        std=std[:3],
    )
    save(rgb_network, tmp_path / "rgb.safetensors")
    config = compose([*TINY, *THIRTEEN_BANDS, f"weights={tmp_path / 'rgb.safetensors'}"])
    with tracking.run("e", "r", system_metrics=False) as run:
        metrics = train.train(config, data, run)
    assert 0 <= metrics["test_accuracy"] <= 1
    assert tracking.get(run.run_id).params["data.bands"] == "all"


@pytest.mark.real_data
@pytest.mark.parametrize(("option", "count"), [("all", 13), ("rgb", 3)])
def test_real_tiles_with_thirteen_bands_are_read(
    eurosat_root: Path, tmp_path: Path, option: str, count: int
) -> None:
    folder = eurosat_root / "EuroSAT_MS_sample"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: the multispectral sample is missing")
    pack = open_pack(
        compose(
            [
                "data=folder",
                f"data.root={folder}",
                "data.dtype=uint16",
                f"data.bands={option}",
                f"data.cache={tmp_path}",
            ]
        ).data
    )
    assert pack.bands == count
    assert len(pack.table) == len(list(folder.rglob("*.tif")))
    stds = pack.tiles_NHWC.reshape(-1, count).std(axis=0)
    varied = [n for n, name in enumerate(bands.NAMES) if name != bands.CIRRUS]
    assert (stds[varied if count > 3 else slice(None)] > 2).all()
