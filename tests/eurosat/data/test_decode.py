"""Files from others are refused by their header, before their content is decoded."""

import io
import os
import stat
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from eurosat.data import decode as decoding
from eurosat.data.decode import decode
from eurosat.errors import DataError
from tests.support.malformed_requests import many_scans
from tests.support.tiffs import eps, image, sparse_tiff, tiff_with_large_block

pytestmark = pytest.mark.filterwarnings(
    "ignore:Dataset has no geotransform"  # tiles need no geographic coordinates
)


def refusal(data: bytes, dtype: str = "uint8") -> str:
    with pytest.raises(DataError) as caught:
        decode(data, "River/x.jpg", dtype=dtype, reflectance_max=None)
    message = str(caught.value)
    assert message.startswith("River/x.jpg ")
    assert "\n" not in message
    return message


def test_a_postscript_file_runs_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tmp_path / "executed"
    for name in ("gs", "gswin64c"):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho $@ >> {trace}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    message = refusal(eps())
    assert not trace.exists()
    assert "no JPEG, PNG or TIFF file" in message
    assert "convert it" in message


@pytest.mark.parametrize("kind", ["BMP", "GIF", "WEBP", "ICO", "PPM", "TGA", "PCX", "JPEG2000"])
def test_other_formats_are_refused_by_name(kind: str) -> None:
    assert "no JPEG, PNG or TIFF file" in refusal(image(kind))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_the_listed_formats_are_read(kind: str) -> None:
    assert decode(image(kind), "x", dtype="uint8", reflectance_max=None).shape == (16, 16, 3)


def test_a_tiff_of_many_bands_is_refused_before_they_are_read() -> None:
    data = sparse_tiff(bands=400, side=1024)
    assert len(data) < 200_000
    message = refusal(data, "uint16")
    assert "400 bands" in message
    assert f"at most {decoding.MAX_VALUES:,} values" in message


def test_a_tiff_of_very_many_bands_is_refused() -> None:
    assert f"at most {decoding.MAX_BANDS} bands" in refusal(sparse_tiff(600, 16), "uint16")


def test_a_tiff_with_a_huge_internal_tile_is_refused() -> None:
    data = tiff_with_large_block(64, 8192)
    message = refusal(data)
    assert "internal tiles of 8192x8192 pixels" in message
    assert str(decoding.MAX_TILE_SIDE) in message


def test_a_tiff_in_ordinary_internal_tiles_is_read() -> None:
    pixels = decode(tiff_with_large_block(64, 256), "x", dtype="uint8", reflectance_max=None)
    np.testing.assert_array_equal(pixels, np.zeros((64, 64, 1), np.uint8))


def test_a_tiff_of_another_dtype_is_refused_before_it_is_read() -> None:
    assert "holds float64 pixels" in refusal(sparse_tiff(13, 1024, "float64"), "uint16")


def test_an_image_of_too_many_pixels_is_refused_by_its_header() -> None:
    large = Image.new("1", (20_000, 20_000))  # more than Pillow's own limit
    file = io.BytesIO()
    large.save(file, "PNG")
    tracemalloc.start()
    message = refusal(file.getvalue())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"at most {decoding.MAX_TILE_SIDE} per side" in message
    assert peak < 10_000_000


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    assert f"over {decoding.MAX_JPEG_SCANS} scans" in refusal(many_scans())


def test_an_animation_is_refused() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green")]
    file = io.BytesIO()
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])
    assert "several images" in refusal(file.getvalue())
