"""Sources and the pack: built once, verified when opened, refused with one line."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eurosat.config import DataConfig, SyntheticConfig
from eurosat.data import pack as packs
from eurosat.data.pack import Pack, open_pack, scan_source
from eurosat.data.sources import find_eurosat, open_source
from eurosat.errors import DataError
from tests.support.paths import ROOT


def encode_image(seed: int, size: int = 16, mode: str = "RGB", kind: str = "PNG") -> bytes:
    rng = np.random.default_rng(seed)
    shape = (size, size, 3) if mode == "RGB" else (size, size)
    pixels = rng.integers(0, 256, shape).astype(np.uint16 if mode == "I;16" else np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    """Two classes of six PNG tiles."""
    root = tmp_path / "tiles"
    for number, name in enumerate(("Forest", "River")):
        (root / name).mkdir(parents=True)
        for index in range(6):
            (root / name / f"{name}_{index}.png").write_bytes(encode_image(100 * number + index))
    return root


@pytest.fixture
def config(tiles: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(source="folder", root=str(tiles), cache=str(tmp_path / "cache"))


def test_a_pack_holds_every_tile_with_its_class_and_statistics(
    config: DataConfig, tiles: Path
) -> None:
    pack = open_pack(config)
    assert pack.tiles_NHWC.shape == (12, 16, 16, 3)
    assert pack.classes == ("Forest", "River")
    assert pack.labels.tolist() == [0] * 6 + [1] * 6
    assert list(pack.table["path"]) == sorted(pack.table["path"])
    third = np.asarray(Image.open(tiles / pack.table["path"].iloc[2]))
    np.testing.assert_array_equal(pack.tiles_NHWC[2], third)
    row = pack.table.iloc[2]
    assert (row["min"], row["max"]) == (third.min(), third.max())
    assert row["mean"] == pytest.approx(third.mean())
    assert row["std"] == pytest.approx(third.std())


def test_a_pack_is_built_once_and_shared_without_copies(config: DataConfig) -> None:
    first, second = open_pack(config), open_pack(config)
    assert isinstance(second.tiles_NHWC, np.memmap)
    assert not second.tiles_NHWC.flags.writeable
    assert first.directory == second.directory
    assert len(list(first.directory.parent.glob("folder-*/"))) == 1


def test_the_fingerprint_is_the_same_for_a_folder_and_a_zip_with_any_prefix(
    config: DataConfig, tiles: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "any.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for file in sorted(tiles.rglob("*.png"), reverse=True):
            opened.write(file, f"some/prefix/{file.parent.name}/{file.name}")
    zipped = open_pack(replace(config, root=str(archive)))
    assert zipped.fingerprint == open_pack(config).fingerprint


def test_a_changed_file_makes_another_pack_and_fingerprint(config: DataConfig, tiles: Path) -> None:
    before = open_pack(config)
    (tiles / "Forest" / "Forest_0.png").write_bytes(encode_image(7))
    after = open_pack(config)
    assert after.fingerprint != before.fingerprint
    assert after.directory != before.directory


def truncate(tiles: Path) -> None:
    file = tiles / "River" / "River_3.png"
    file.write_bytes(file.read_bytes()[:200])


def replace_tile(data: bytes) -> Callable[[Path], None]:
    def change(tiles: Path) -> None:
        (tiles / "River" / "River_3.png").write_bytes(data)

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "is unreadable or truncated"),
        (replace_tile(b""), "is no JPEG, PNG or TIFF file"),
        (replace_tile(b"not a picture"), "is no JPEG, PNG or TIFF file"),
        (replace_tile(encode_image(1, size=20)), "is 20x20x3, but most tiles are 16x16x3"),
        (replace_tile(encode_image(1, mode="L")), "is 16x16x1, but most tiles are 16x16x3"),
        (
            replace_tile(encode_image(1, mode="I;16")),
            "holds uint16 pixels, but data.dtype is uint8",
        ),
        (
            replace_tile(encode_image(1, mode="I;16", kind="TIFF")),
            "holds uint16 pixels, but data.dtype is uint8",
        ),
        (replace_tile(encode_image(1, size=1100)), "a tile has at most 1024 per side"),
    ],
)
def test_a_bad_tile_is_named_with_a_remedy_and_leaves_no_pack(
    config: DataConfig, tiles: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(tiles)
    with pytest.raises(DataError) as caught:
        open_pack(config)
    error = str(caught.value)
    assert error.startswith("River/River_3.png")
    assert message in error
    assert "1 of 12 tiles have a fault" in error
    assert "\n" not in error
    assert not list((config.cache_dir / "packs").glob("*/"))


def test_a_scan_reports_all_faults_at_once(config: DataConfig, tiles: Path) -> None:
    for index in (1, 4):
        (tiles / "Forest" / f"Forest_{index}.png").write_bytes(b"junk")
    scan = scan_source(config)
    assert scan.pack is None
    faulty = scan.table[scan.table["fault"].notna()]
    assert list(faulty["path"]) == ["Forest/Forest_1.png", "Forest/Forest_4.png"]


def test_16_bit_tiles_are_scaled_from_reflectance(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / "t" / name).mkdir(parents=True)
        values = np.full((16, 16), 1375, np.uint16)
        values[0, 0] = 60000
        Image.fromarray(values).save(tmp_path / "t" / name / "1.tif")
    pack = open_pack(
        DataConfig(
            source="folder", root=str(tmp_path / "t"), dtype="uint16", cache=str(tmp_path / "cache")
        )
    )
    assert np.max(pack.tiles_NHWC[0, :, :, 0]) == 255
    assert pack.tiles_NHWC[0, 1, 1, 0] == 128  # half of 2750


def test_the_number_of_bands_is_read_from_the_files(tmp_path: Path) -> None:
    import rasterio

    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "t" / name).mkdir(parents=True)
        for index in range(2):
            values = rng.integers(0, 2750, (13, 16, 16)).astype(np.uint16)
            transform = rasterio.Affine(10, 0, 0, 0, -10, 0)
            with rasterio.open(
                tmp_path / "t" / name / f"{index}.tif",
                "w",
                driver="GTiff",
                height=16,
                width=16,
                count=13,
                dtype="uint16",
                crs="EPSG:32631",
                transform=transform,
            ) as file:
                file.write(values)
    pack = open_pack(
        DataConfig(
            source="folder", root=str(tmp_path / "t"), dtype="uint16", cache=str(tmp_path / "cache")
        )
    )
    assert pack.bands == 13


@pytest.mark.parametrize("name", [packs.TILES, packs.TABLE, packs.META])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_corrupt_pack_is_refused_with_a_remedy(
    config: DataConfig, name: str, damage: str
) -> None:
    file = open_pack(config).directory / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    match damage:
        case "flip":
            file.write_bytes(content)
        case "cut":
            file.write_bytes(content[: len(content) // 2])
        case "remove":
            file.unlink()
    if (name, damage) == (packs.META, "flip"):
        file.write_text("{}")
    with pytest.raises(DataError, match="corrupt pack.*remove .* to rebuild it"):
        open_pack(config)


def test_a_killed_build_leaves_no_pack(tmp_path: Path) -> None:
    program = (
        "import sys; from eurosat.config import *; from eurosat.data.pack import open_pack\n"
        "open_pack(DataConfig(source='synthetic', cache=sys.argv[1],"
        " synthetic=SyntheticConfig(tiles=4000)))"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT)
    folder = tmp_path / "packs"
    deadline = time.monotonic() + 60
    while not list(folder.glob(f".*/{packs.TILES}")) and time.monotonic() < deadline:
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert list(folder.glob(".synthetic-*")), "the build was killed before it began"
    assert not list(folder.glob("synthetic-*/"))
    small = DataConfig(
        source="synthetic", cache=str(tmp_path), synthetic=SyntheticConfig(tiles=20, size=32)
    )
    assert len(open_pack(small).table) == 20


def test_the_next_build_removes_what_a_killed_build_left(config: DataConfig) -> None:
    directory = open_pack(config).directory
    leftover = directory.with_name(f".{directory.name}.12345")
    directory.rename(leftover)
    assert open_pack(config).directory.exists()
    assert not leftover.exists()


def test_two_builders_at_once_make_one_pack(config: DataConfig) -> None:
    program = (
        "import sys; from eurosat.config import DataConfig\n"
        "from eurosat.data.pack import open_pack\n"
        "config = DataConfig(source='folder', root=sys.argv[1], cache=sys.argv[2])\n"
        "print(open_pack(config).directory)"
    )
    command = [sys.executable, "-c", program, str(config.root), config.cache]
    children = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [child.communicate(timeout=60)[0] for child in children]
    assert outputs[0] == outputs[1] != ""
    assert [child.returncode for child in children] == [0, 0]


def test_a_disk_that_is_too_small_is_reported_before_anything_is_written(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match="free some disk space or set EUROSAT_CACHE"):
        open_pack(config)


def test_a_disk_that_fills_up_while_writing_leaves_no_pack(config: DataConfig) -> None:
    """A file-size limit of the process stands in for a full disk: writes fail alike."""
    program = (
        "import resource, signal, sys; from eurosat.config import DataConfig\n"
        "from eurosat.data import pack; import numpy, pandas, pyarrow, PIL.Image, filelock\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "config = DataConfig(source='folder', root=sys.argv[1], cache=sys.argv[2])\n"
        "try: pack.open_pack(config)\n"
        "except pack.DataError as error: print(error)"
    )
    child = subprocess.run(
        [sys.executable, "-c", program, str(config.root), config.cache],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("COVERAGE")},
    )
    assert child.stdout.startswith("cannot write the pack"), child.stderr
    assert "EUROSAT_CACHE" in child.stdout
    assert not list((config.cache_dir / "packs").glob("folder-*/"))
    assert not list((config.cache_dir / "packs").glob(".folder-*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_without_write_permission_is_named(config: DataConfig, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match="cannot write the pack"):
        open_pack(config)
    tmp_path.chmod(0o700)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder or zip of tiles at .*nowhere"):
        open_pack(DataConfig(source="folder", root=str(tmp_path / "nowhere")))


def test_a_class_folder_without_images_is_named(config: DataConfig, tiles: Path) -> None:
    (tiles / "Empty").mkdir()
    with pytest.raises(DataError, match="no images .* in class folder .*Empty"):
        open_pack(config)


def test_one_class_is_too_few(tmp_path: Path) -> None:
    (tmp_path / "Forest").mkdir()
    (tmp_path / "Forest" / "1.png").write_bytes(encode_image(1))
    with pytest.raises(DataError, match="at least 2 are needed"):
        open_source(DataConfig(source="folder", root=str(tmp_path)))


def test_a_broken_zip_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.zip").write_bytes(b"PK nothing")
    with pytest.raises(DataError, match="is not a complete zip"):
        open_source(DataConfig(source="folder", root=str(tmp_path / "broken.zip")))


def test_a_damaged_zip_member_is_named(config: DataConfig, tmp_path: Path, tiles: Path) -> None:
    archive = tmp_path / "damaged.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for file in tiles.rglob("*.png"):
            opened.write(file, f"{file.parent.name}/{file.name}")
        info = opened.getinfo("River/River_2.png")
    content = bytearray(archive.read_bytes())
    content[info.header_offset + 300] ^= 0xFF
    archive.write_bytes(content)
    with pytest.raises(DataError, match="River/River_2.png .*download the archive again"):
        open_pack(replace(config, root=str(archive)))


def test_a_file_listed_twice_in_a_zip_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as opened:
        for prefix in ("a", "b"):
            opened.writestr(f"{prefix}/Forest/1.png", encode_image(1))
    with pytest.raises(DataError, match="contains Forest/1.png twice"):
        open_source(DataConfig(source="folder", root=str(tmp_path / "twice.zip")))


def test_a_root_without_eurosat_is_refused_and_nothing_is_downloaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no EuroSAT tiles under"):
        open_source(DataConfig(source="eurosat", root=str(tmp_path)))


@pytest.mark.parametrize("name", ["2750", "EuroSAT_RGB", "eurosat/2750"])
def test_eurosat_is_found_under_its_usual_names(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir(parents=True)
    assert find_eurosat(tmp_path) == tmp_path / name


def test_a_failed_download_names_the_alternatives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision.datasets

    attempts: list[str] = []

    def refuse(root: str, download: bool) -> None:
        attempts.append(root)
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "EuroSAT", refuse)
    with pytest.raises(DataError, match="no route to host.*set EUROSAT_ROOT"):
        open_source(DataConfig(source="eurosat", cache=str(tmp_path)))
    assert len(attempts) == 1
    assert not list(tmp_path.iterdir()), "no partial download is left"


def test_synthetic_tiles_are_the_same_in_another_process(tiny_pack: Pack) -> None:
    config = DataConfig(source="synthetic", synthetic=SyntheticConfig(tiles=200, size=32))
    source = open_source(config)
    pixels = np.asarray(Image.open(io.BytesIO(source.read("River/River_3.jpg"))))
    row = list(source.paths).index("River/River_3.jpg")
    np.testing.assert_array_equal(tiny_pack.tiles_NHWC[row], pixels)


@pytest.mark.real_data
def test_the_real_tiles_are_complete_and_seven_places_appear_twice(real_pack: Pack) -> None:
    assert real_pack.tiles_NHWC.shape == (27_000, 64, 64, 3)
    counts = real_pack.table["class"].value_counts()
    assert counts["Pasture"] == 2000
    assert counts["SeaLake"] == 3000
    assert (real_pack.num_exact_duplicates, real_pack.num_near_duplicates) == (0, 7)
    fingerprint = "8c2d76c5506ab263f3fff7333cc7c84fa844266b697e4da0b711ddc8cf39675f"
    assert real_pack.fingerprint == fingerprint
