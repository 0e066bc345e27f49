"""Folders and buckets: whole files or none, whatever the network and the server do."""

import json
import math
import os
import random
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from eurosat.config import DataConfig, compose, from_mapping
from eurosat.data.pack import open_pack
from eurosat.data.sources import open_source
from eurosat.errors import DataError, StorageError
from eurosat.storage import GcsStore, ObjectInfo, ObjectStore, mirror, open_store
from eurosat.storage.checksums import file_crc32c
from eurosat.storage.object_store import WORKERS
from eurosat.storage.partial import UNFINISHED
from tests.support.mlflow_server import free_port
from tests.support.object_stores import (
    Proxy,
    fake_gcs_server,
    gcp_storage_emulator,
    make_bucket,
    refusing_server,
)

EMULATORS = ("fake-gcs-server", "gcp-storage-emulator")
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with fake_gcs_server(tmp_path_factory.mktemp("objects")) as fake, gcp_storage_emulator() as gcp:
        yield dict(zip(EMULATORS, (fake, gcp), strict=True))


@pytest.fixture(params=EMULATORS)
def server(request: pytest.FixtureRequest, servers: dict[str, str]) -> str:
    """The URL of each emulator in turn."""
    return servers[request.param]


@pytest.fixture
def bucket(
    server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> GcsStore:
    """A prefix of a bucket of the test's own."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
    name = f"b{abs(hash(request.node.name))}"
    store = open_store(f"{make_bucket(server, name)}/tiles/", patience_s=10)
    assert isinstance(store, GcsStore)
    return store


@pytest.fixture(params=(*EMULATORS, "folder"))
def store(
    request: pytest.FixtureRequest,
    servers: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> ObjectStore:
    if request.param == "folder":
        (tmp_path / "store").mkdir()
        return open_store(str(tmp_path / "store"))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", servers[request.param])
    name = f"b{abs(hash(request.node.name))}"
    return open_store(f"{make_bucket(servers[request.param], name)}/tiles")


@pytest.fixture
def proxy(server: str) -> Iterator[Proxy]:
    with Proxy(server) as between:
        yield between


def written(folder: Path, **files: bytes) -> Path:
    """Files by their name, where ``__`` stands for a slash."""
    for name, content in files.items():
        file = folder / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return folder


def held(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def noise(size: int) -> bytes:
    """Bytes that differ from piece to piece."""
    drawn = random.Random(size)
    return b"".join(drawn.randbytes(min(MEGABYTE, size - at)) for at in range(0, size, MEGABYTE))


def test_uploaded_files_are_listed_and_downloaded(store: ObjectStore, tmp_path: Path) -> None:
    given = written(tmp_path / "given", Forest__1=b"a", Forest__2=b"", River__ö=b"c")
    store.upload(given, sorted(held(given)))
    objects = store.list_objects()
    assert [(info.key, info.size) for info in objects] == [
        ("Forest/1", 1),
        ("Forest/2", 0),
        ("River/ö", 1),
    ]
    assert store.checksum(objects[0]) == file_crc32c(given / "Forest/1")
    assert store.find("River/ö") == objects[2]
    assert store.find("River/none") is None
    store.download(objects, tmp_path / "back")
    assert held(tmp_path / "back") == held(given)


def test_a_mirror_downloads_changed_files_and_deletes_missing_ones(
    store: ObjectStore, tmp_path: Path
) -> None:
    given = written(tmp_path / "given", A__1=b"a", A__2=b"b", B__1=b"c", A__notes=b"no tile")
    given = written(given, **{"A__3.PNG": b"d", "C__only.png": b"e"})
    store.upload(given, sorted(held(given)))
    here = tmp_path / "here"
    assert mirror(store, here) == 6
    assert mirror(store, here) == 0
    before = (here / "A/1").stat().st_mtime_ns
    store.upload(written(given, A__2=b"B"), ["A/2"])
    for key in ("B/1", "B/never"):
        store.delete(key)
    (given / "B/1").unlink()
    assert mirror(store, here) == 1
    assert held(here) == held(given)
    assert not (here / "B").exists()
    assert (here / "A/1").stat().st_mtime_ns == before
    assert mirror(store, tmp_path / "tiles", (".png",)) == 2
    assert set(held(tmp_path / "tiles")) == {"A/3.PNG", "C/only.png"}


def test_a_damaged_local_file_is_downloaded_again(store: ObjectStore, tmp_path: Path) -> None:
    store.upload(written(tmp_path / "given", A__1=b"right"), ["A/1"])
    mirror(store, tmp_path / "here")
    written(tmp_path / "here", A__1=b"wrong")
    assert mirror(store, tmp_path / "here") == 1
    assert held(tmp_path / "here") == {"A/1": b"right"}


@pytest.mark.parametrize("size", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_a_large_object_is_never_held_in_memory(
    bucket: GcsStore, tmp_path: Path, size: int
) -> None:
    written(tmp_path / "given", large=noise(size * MEGABYTE))
    code = """
import resource, sys
from pathlib import Path
from eurosat.storage import open_store
store = open_store(sys.argv[1])
store.list_objects()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
before = peak()
store.upload(Path("given"), ["large"])
store.download(store.list_objects(), Path("back"))
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, bucket.url],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    assert file_crc32c(tmp_path / "back/large") == file_crc32c(tmp_path / "given/large")
    assert (tmp_path / "back/large").stat().st_size == size * MEGABYTE
    assert set(held(tmp_path / "back")) == {"large"}, "nothing unfinished is left"
    assert float(done.stdout) < 100, "megabytes of memory"


def test_a_broken_connection_resumes_where_it_broke(
    bucket: GcsStore, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    piece, size = 1 << 20, 9 << 20  # what is over 8 MiB goes up in pieces
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
    given = written(tmp_path / "given", large=noise(size + 5))
    far = replace(bucket, chunk_bytes=piece)
    proxy.cuts, proxy.cut_after = 1, piece // 2
    far.upload(given, ["large"])
    assert proxy.cuts == 0
    assert proxy.sent < size + 2 * piece, "not all of it again"
    proxy.cuts, proxy.received = 3, 0
    far.download(far.list_objects(), tmp_path / "back")
    assert proxy.cuts == 0
    assert held(tmp_path / "back") == held(given)
    assert proxy.received < size + piece, "only what was missing again"


def test_a_failed_download_resumes_with_its_missing_chunks(
    bucket: GcsStore, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    piece, pieces = 1 << 18, WORKERS + 4
    given = written(tmp_path / "given", large=noise(pieces * piece))
    bucket.upload(given, ["large"])
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
    far = replace(bucket, chunk_bytes=piece, patience_s=2)
    objects, back = far.list_objects(), tmp_path / "back"
    proxy.received, proxy.dead_after = 0, (WORKERS + 2) * piece  # two are whole, or more
    with pytest.raises(StorageError, match="large cannot be reached at http://127"):
        far.download(objects, back)
    assert "large" not in held(back)
    (marks,) = (back / UNFINISHED).glob("*.pieces")
    here = len(marks.read_text().split())
    assert here >= 2
    proxy.received, proxy.dead_after = 0, math.inf
    far.download(objects, back)
    assert held(back) == held(given)
    assert proxy.received < (pieces - here) * piece + 20_000


def test_an_unreachable_server_is_reported_in_one_line(
    bucket: GcsStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{free_port()}")
    far = open_store(bucket.url, patience_s=1)
    for does in (
        far.list_objects,
        lambda: far.upload(written(tmp_path, a=b"a"), ["a"]),
        lambda: far.delete("a"),
    ):
        with pytest.raises(StorageError, match="cannot be reached .* check the network") as said:
            does()
        assert "\n" not in str(said.value)


def test_a_missing_bucket_is_named_with_the_command_that_creates_it(
    bucket: GcsStore, tmp_path: Path
) -> None:
    there = written(tmp_path, a=b"a")
    bucket.upload(there, ["a"])
    (info,) = bucket.list_objects()
    gone = GcsStore("no-such-bucket", patience_s=5)
    for does in (
        gone.list_objects,
        lambda: gone.find("a"),
        lambda: gone.upload(there, ["a"]),
        lambda: gone.download([info], tmp_path / "back"),
        lambda: gone.delete("a"),
    ):
        with pytest.raises(StorageError, match="no bucket gs://no-such-bucket: make it") as said:
            does()
        assert "\n" not in str(said.value)


def test_an_object_deleted_before_its_download_is_named(bucket: GcsStore, tmp_path: Path) -> None:
    bucket.upload(written(tmp_path / "given", a=b"a"), ["a"])
    objects = bucket.list_objects()
    bucket.delete("a")
    with pytest.raises(StorageError, match=f"{bucket.url}/a is not there: it was deleted"):
        bucket.download(objects, tmp_path / "back")
    assert "a" not in held(tmp_path / "back")


@pytest.mark.parametrize(
    ("status", "reason"),
    [(401, "Invalid Credentials"), (403, "x@y does not have storage.objects.list access")],
)
def test_refused_credentials_are_reported_with_a_remedy(
    status: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refusing_server(status, reason) as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        store = open_store("gs://private/tiles", patience_s=5)
        given = written(tmp_path, a=b"a")
        listed = ObjectInfo(key="a", size=1, generation="1")
        for does in (
            store.list_objects,
            lambda: store.find("a"),
            lambda: store.upload(given, ["a"]),
            lambda: store.download([listed], tmp_path / "back"),
        ):
            with pytest.raises(StorageError, match="credentials are refused or missing") as said:
                does()
            assert "gs://private/tiles" in str(said.value)
            assert "GOOGLE_APPLICATION_CREDENTIALS" in str(said.value)
            assert "\n" not in str(said.value)


def test_an_invalid_key_is_refused_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    with refusing_server(400, "invalid_grant") as url:
        written(
            tmp_path,
            **{
                "key.json": json.dumps(
                    {
                        "type": "service_account",
                        "client_email": "x@y",
                        "token_uri": url,
                        "private_key": key.decode(),
                        "project_id": "p",
                    }
                ).encode()
            },
        )
        with pytest.raises(StorageError, match="credentials are refused or missing"):
            open_store("gs://private").list_objects()
    (tmp_path / "key.json").unlink()
    with pytest.raises(StorageError, match="credentials are refused or missing .*key.json"):
        open_store("gs://private").list_objects()


def test_a_download_that_arrives_damaged_replaces_nothing(
    bucket: GcsStore, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = written(tmp_path / "given", a=b"spotless", b=b"fine")
    bucket.upload(given, ["a", "b"])
    back = written(tmp_path / "back", a=b"the one before")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
    far = open_store(bucket.url)
    proxy.spoil = (b"spotless", b"spotlest")
    with pytest.raises(StorageError, match=f"{bucket.url}/a came with crc32c .* the bucket says"):
        far.download(far.list_objects(), back)
    assert (back / "a").read_bytes() == b"the one before"
    proxy.spoil = (b"", b"")
    far.download(far.list_objects(), back)
    assert held(back) == held(given)


def test_an_object_overwritten_since_its_listing_is_not_downloaded(
    bucket: GcsStore, tmp_path: Path
) -> None:
    bucket.upload(written(tmp_path / "given", a=b"old"), ["a"])
    objects = bucket.list_objects()
    bucket.upload(written(tmp_path / "given", a=b"new"), ["a"])
    with pytest.raises(StorageError, match="run the command again"):
        bucket.download(objects, tmp_path / "back")
    assert "a" not in held(tmp_path / "back")


def test_new_files_do_not_replace_existing_ones(
    servers: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked of the emulator that honours generations, and of a folder."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", servers["fake-gcs-server"])
    (tmp_path / "store").mkdir()
    for root in (make_bucket(servers["fake-gcs-server"], "new"), str(tmp_path / "store")):
        store = open_store(root)
        given = written(tmp_path / "given", a=b"first")
        store.upload(given, ["a"], new=True)
        written(given, a=b"second")
        with pytest.raises(StorageError, match="a exists already"):
            store.upload(given, ["a"], new=True)
        store.download(store.list_objects(), tmp_path / "back")
        assert held(tmp_path / "back") == {"a": b"first"}


@pytest.mark.parametrize("path", ["../a", "/a", "A/../../a"])
def test_a_key_that_leads_out_of_the_folder_is_refused(
    path: str, bucket: GcsStore, tmp_path: Path
) -> None:
    bucket.upload(written(tmp_path / "given", a=b"a"), ["a"])
    (info,) = bucket.list_objects()
    with pytest.raises(StorageError, match="leads out of"):
        bucket.download([replace(info, key=path)], tmp_path / "inner" / "back")
    assert not (tmp_path / "inner").exists()


@pytest.mark.parametrize("root", ["gs://", "gs:///tiles"])
def test_an_address_without_a_bucket_is_refused(root: str) -> None:
    with pytest.raises(StorageError, match="names no bucket"):
        open_store(root)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=f"no folder {tmp_path}/none"):
        open_store(f"{tmp_path}/none")


def test_a_folder_that_cannot_be_written_is_named(bucket: GcsStore, tmp_path: Path) -> None:
    bucket.upload(written(tmp_path / "given", a=b"a"), ["a"])
    (tmp_path / "back").write_text("a file where a folder should be")
    with pytest.raises(StorageError, match=f"{tmp_path}/back.*: .*name another folder"):
        bucket.download(bucket.list_objects(), tmp_path / "back")


def dataset(root: str, cache: Path, source: str = "folder") -> DataConfig:
    return from_mapping(DataConfig, {"source": source, "root": root, "cache": str(cache)}, "data")


def test_a_bucket_has_the_fingerprint_of_the_folder_that_was_uploaded(
    bucket: GcsStore, tmp_path: Path
) -> None:
    tiles = source_tiles(tmp_path / "tiles")
    bucket.upload(tiles, sorted(held(tiles)))
    near = open_pack(dataset(str(tiles), tmp_path / "near"))
    far = open_pack(dataset(bucket.url, tmp_path / "far"))
    assert far.fingerprint == near.fingerprint
    again = open_pack(dataset(f"{bucket.url}/", tmp_path / "far"))
    assert again.directory == far.directory, "nothing came, and nothing was read again"


def test_only_a_tile_that_changed_in_the_bucket_is_downloaded(
    bucket: GcsStore, tmp_path: Path
) -> None:
    tiles = source_tiles(tmp_path / "tiles")
    bucket.upload(tiles, sorted(held(tiles)))
    before = open_pack(dataset(bucket.url, tmp_path / "far")).fingerprint
    mirrored = next((tmp_path / "far" / "buckets").glob("*/"))
    times = {file: file.stat().st_mtime_ns for file in mirrored.rglob("*.jpg")}
    (tiles / "River/River_1.jpg").write_bytes((tiles / "River/River_2.jpg").read_bytes())
    bucket.upload(tiles, ["River/River_1.jpg"])
    changed = open_pack(dataset(bucket.url, tmp_path / "far")).fingerprint
    assert changed != before
    assert changed == open_pack(dataset(str(tiles), tmp_path / "near")).fingerprint
    newer = [file.name for file, time in times.items() if file.stat().st_mtime_ns != time]
    assert newer == ["River_1.jpg"]


def test_a_zip_in_a_bucket_is_a_data_set(bucket: GcsStore, tmp_path: Path) -> None:
    tiles = source_tiles(tmp_path / "tiles")
    near = open_pack(dataset(str(tiles), tmp_path / "near")).fingerprint
    archive = tmp_path / "up" / "EuroSAT_RGB.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as opened:
        for file in tiles.rglob("*.jpg"):
            opened.write(file, file.relative_to(tmp_path))
    bucket.upload(archive.parent, [archive.name])
    for root, source in (
        (f"{bucket.url}/{archive.name}", "folder"),
        (f"{bucket.url}/{archive.name}", "eurosat"),
        (bucket.url, "eurosat"),
    ):
        assert open_pack(dataset(root, tmp_path / "far", source)).fingerprint == near


def test_an_empty_bucket_is_named_in_the_error(bucket: GcsStore, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"no tiles at {bucket.url}"):
        open_pack(dataset(bucket.url, tmp_path))
    with pytest.raises(DataError, match=f"no zip of tiles at {bucket.url}/none.zip"):
        open_pack(dataset(f"{bucket.url}/none.zip", tmp_path))


def source_tiles(root: Path) -> Path:
    """Thirty procedural tiles as files."""
    source = open_source(compose(["data=synthetic", "data.synthetic.tiles=30"]).data)
    for path in source.paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(source.read(path))
    return root
