"""Archives and folders from others: counted and measured before a tile of them is read."""

import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from eurosat.config import DataConfig
from eurosat.data import __main__ as commands
from eurosat.data import sources
from eurosat.data.pack import scan_source
from eurosat.data.sources import Source, open_path
from eurosat.errors import DataError
from tests.support.tiffs import image

MB = 1_000_000


def write_zip(
    file: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED
) -> Path:
    """Write good tiles of two classes, and ``members``."""
    with zipfile.ZipFile(file, "w", compression) as opened:
        for name in ("Forest/1.png", "River/1.png"):
            opened.writestr(name, image("PNG"))
        for name, data in members.items():
            opened.writestr(name, data)
    return file


def one_line(error: pytest.ExceptionInfo[DataError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def peak_of(call: Callable[[], object]) -> tuple[str, int]:
    """Return the error of a call, and the most memory that it took, in bytes."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught:
            call()
        return one_line(caught), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_member_that_grows_is_refused_before_it_is_read(tmp_path: Path) -> None:
    bomb = write_zip(tmp_path / "bomb.zip", {"River/2.jpg": bytes(300 * MB)})
    assert bomb.stat().st_size < MB
    source = open_path(bomb, "folder")
    message, peak = peak_of(lambda: source.read("River/2.jpg"))
    assert peak < MB
    assert "River/2.jpg" in message
    assert "300,000,000 bytes" in message
    assert f"{sources.MAX_FILE_BYTES:,}" in message


def test_a_member_that_is_larger_than_it_says_is_refused_while_it_is_read(tmp_path: Path) -> None:
    bomb = write_zip(tmp_path / "liar.zip", {"River/2.jpg": bytes(100 * MB)})
    content = bytearray(bomb.read_bytes())
    claimed = struct.pack("<I", 100 * MB)
    assert content.count(claimed) == 2, "once in the directory, once before the data"
    bomb.write_bytes(content.replace(claimed, struct.pack("<I", 1000)))
    source = open_path(bomb, "folder")
    message, peak = peak_of(lambda: source.read("River/2.jpg"))
    assert peak < 5 * MB
    assert "River/2.jpg" in message


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_that_cannot_be_bounded_is_refused(tmp_path: Path, compression: int) -> None:
    archive = write_zip(tmp_path / "other.zip", {"River/2.jpg": bytes(MB)}, compression)
    message, _ = peak_of(lambda: open_path(archive, "folder").read("River/2.jpg"))
    assert "deflate" in message


def test_an_archive_that_grows_as_a_whole_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    blank = bytes(40 * MB)
    bomb = write_zip(tmp_path / "many.zip", {f"River/{n}.tif": blank for n in range(10, 40)})
    with pytest.raises(DataError) as caught:
        open_path(bomb, "folder")
    message = one_line(caught)
    assert str(bomb) in message
    assert f"at most {sources.MAX_COMPRESSION_RATIO} times" in message


def test_an_archive_of_too_many_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_ARCHIVE_FILES", 20)
    archive = write_zip(tmp_path / "many.zip", {f"notes/{n}.txt": b"" for n in range(30)})
    with pytest.raises(DataError, match="32 files, at most 20"):
        open_path(archive, "folder")


@pytest.mark.parametrize(
    "name",
    [
        "../River/2.jpg",
        "River/../../2.jpg",
        "../2.jpg",
        "/River/2.jpg",
        "C:/River/2.jpg",
        "..\\River/2.jpg",
        "Ri\nver/2.jpg",
        "River/\x1b[2J.jpg",
        "./../x/2.png",
    ],
)
def test_a_name_that_leaves_the_folder_or_a_line_is_refused(tmp_path: Path, name: str) -> None:
    archive = write_zip(tmp_path / "names.zip", {name: image("PNG")})
    with pytest.raises(DataError) as caught:
        open_path(archive, "folder")
    message = one_line(caught)
    assert repr(name) in message
    assert "rename" in message


def test_fetching_a_zip_writes_only_below_the_folder(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "names.zip", {"x/../2.png": image("PNG")})
    with pytest.raises(DataError):
        commands.main(["fetch", "data=folder", f"data.root={archive}", f"to={tmp_path / 'to'}"])
    assert not list(tmp_path.rglob("2.png"))


def folder_with(root: Path) -> Path:
    for name in ("Forest", "River"):
        (root / name).mkdir(parents=True)
        (root / name / "1.png").write_bytes(image("PNG"))
    return root


def sparse_file(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(10_000 * MB)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (sparse_file, "10,000,000,000 bytes"),
        (os.mkfifo, "not a regular file"),
        (lambda file: file.symlink_to("/dev/zero"), "not a regular file"),
        (lambda file: file.mkdir(), "not a regular file"),
    ],
)
def test_what_is_no_file_of_a_tiles_size_is_a_faulty_tile(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    root = folder_with(tmp_path / "tiles")
    make(root / "River" / "2.jpg")
    config = DataConfig(source="folder", root=str(root), cache=str(tmp_path / "cache"))
    table = scan_source(config).table.set_index("path")
    assert message in str(table["fault"]["River/2.jpg"])
    assert table["fault"].notna().sum() == 1


def test_a_folder_name_that_leaves_a_line_is_refused(tmp_path: Path) -> None:
    root = folder_with(tmp_path / "tiles")
    (root / "Ri\nver").mkdir()
    (root / "Ri\nver" / "1.png").write_bytes(image("PNG"))
    with pytest.raises(DataError, match="rename"):
        open_path(root, "folder")


def test_ordinary_archives_are_read(tmp_path: Path) -> None:
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        file = tmp_path / f"{compression}.zip"
        source: Source = open_path(write_zip(file, {"River/2.png": image("PNG")}, compression), "x")
        assert source.read("River/2.png") == image("PNG")
