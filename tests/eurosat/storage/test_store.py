"""Folders and buckets: complete files or none, whatever the network and the server do."""

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
    """The URL of each emulator, one after the other."""
    return servers[request.param]


@pytest.fixture
def bucket(
    server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> GcsStore:
    """A prefix in a bucket for this test alone."""
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


def write_files(folder: Path, **files: bytes) -> Path:
    """Write files by name, in which ``__`` stands for a slash; return the folder."""
    for name, content in files.items():
        file = folder / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder, by its path."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def noise(size: int) -> bytes:
    """Return random bytes, which differ from chunk to chunk."""
    rng = random.Random(size)
    return b"".join(rng.randbytes(min(MEGABYTE, size - at)) for at in range(0, size, MEGABYTE))


def test_uploaded_files_are_listed_and_downloaded(store: ObjectStore, tmp_path: Path) -> None:
    source = write_files(tmp_path / "source", Forest__1=b"a", Forest__2=b"", River__ö=b"c")
    store.upload(source, sorted(contents(source)))
    objects = store.list_objects()
    assert [(info.key, info.size) for info in objects] == [
        ("Forest/1", 1),
        ("Forest/2", 0),
        ("River/ö", 1),
    ]
    assert store.checksum(objects[0]) == file_crc32c(source / "Forest/1")
    assert store.find("River/ö") == objects[2]
    assert store.find("River/none") is None
    store.download(objects, tmp_path / "downloaded")
    assert contents(tmp_path / "downloaded") == contents(source)


def test_a_mirror_downloads_changed_files_and_deletes_missing_ones(
    store: ObjectStore, tmp_path: Path
) -> None:
    source = write_files(tmp_path / "source", A__1=b"a", A__2=b"b", B__1=b"c", A__notes=b"no tile")
    source = write_files(source, **{"A__3.PNG": b"d", "C__only.png": b"e"})
    store.upload(source, sorted(contents(source)))
    copy = tmp_path / "copy"
    assert mirror(store, copy) == 6
    assert mirror(store, copy) == 0
    before = (copy / "A/1").stat().st_mtime_ns
    store.upload(write_files(source, A__2=b"B"), ["A/2"])
    for key in ("B/1", "B/never"):
        store.delete(key)
    (source / "B/1").unlink()
    assert mirror(store, copy) == 1
    assert contents(copy) == contents(source)
    assert not (copy / "B").exists()
    assert (copy / "A/1").stat().st_mtime_ns == before
    assert mirror(store, tmp_path / "tiles", (".png",)) == 2
    assert set(contents(tmp_path / "tiles")) == {"A/3.PNG", "C/only.png"}


def test_a_damaged_local_file_is_downloaded_again(store: ObjectStore, tmp_path: Path) -> None:
    store.upload(write_files(tmp_path / "source", A__1=b"right"), ["A/1"])
    mirror(store, tmp_path / "copy")
    write_files(tmp_path / "copy", A__1=b"wrong")
    assert mirror(store, tmp_path / "copy") == 1
    assert contents(tmp_path / "copy") == {"A/1": b"right"}


@pytest.mark.parametrize("size", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_a_large_object_is_never_held_in_memory(
    bucket: GcsStore, tmp_path: Path, size: int
) -> None:
    write_files(tmp_path / "source", large=noise(size * MEGABYTE))
    code = """
import resource, sys
from pathlib import Path
from eurosat.storage import open_store
store = open_store(sys.argv[1])
store.list_objects()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
before = peak()
store.upload(Path("source"), ["large"])
store.download(store.list_objects(), Path("downloaded"))
print(peak() - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, bucket.url],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    assert file_crc32c(tmp_path / "downloaded/large") == file_crc32c(tmp_path / "source/large")
    assert (tmp_path / "downloaded/large").stat().st_size == size * MEGABYTE
    assert set(contents(tmp_path / "downloaded")) == {"large"}, "no unfinished download is left"
    assert float(result.stdout) < 100, "megabytes of memory"


def test_a_broken_connection_resumes_where_it_broke(
    bucket: GcsStore, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk, size = 1 << 20, 9 << 20  # uploads over 8 MiB are in chunks
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
    source = write_files(tmp_path / "source", large=noise(size + 5))
    remote = replace(bucket, chunk_bytes=chunk)
    proxy.cuts, proxy.cut_after = 1, chunk // 2
    remote.upload(source, ["large"])
    assert proxy.cuts == 0
    assert proxy.sent < size + 2 * chunk, "not everything is sent again"
    proxy.cuts, proxy.received = 3, 0
    remote.download(remote.list_objects(), tmp_path / "downloaded")
    assert proxy.cuts == 0
    assert contents(tmp_path / "downloaded") == contents(source)
    assert proxy.received < size + chunk, "only missing bytes are sent again"


def test_a_failed_download_resumes_with_its_missing_chunks(
    bucket: GcsStore, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk, num_chunks = 1 << 18, WORKERS + 4
    source = write_files(tmp_path / "source", large=noise(num_chunks * chunk))
    bucket.upload(source, ["large"])
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
    remote = replace(bucket, chunk_bytes=chunk, patience_s=2)
    objects, downloaded = remote.list_objects(), tmp_path / "downloaded"
    proxy.received, proxy.dead_after = 0, (WORKERS + 2) * chunk  # at least two are complete
    with pytest.raises(StorageError, match="large cannot be reached at http://127"):
        remote.download(objects, downloaded)
    assert "large" not in contents(downloaded)
    (record,) = (downloaded / UNFINISHED).glob("*.pieces")
    complete = len(record.read_text().split())
    assert complete >= 2
    proxy.received, proxy.dead_after = 0, math.inf
    remote.download(objects, downloaded)
    assert contents(downloaded) == contents(source)
    assert proxy.received < (num_chunks - complete) * chunk + 20_000


def test_an_unreachable_server_is_reported_in_one_line(
    bucket: GcsStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{free_port()}")
    remote = open_store(bucket.url, patience_s=1)
    for operation in (
        remote.list_objects,
        lambda: remote.upload(write_files(tmp_path, a=b"a"), ["a"]),
        lambda: remote.delete("a"),
    ):
        with pytest.raises(StorageError, match="cannot be reached .* check the network") as raised:
            operation()
        assert "\n" not in str(raised.value)


def test_a_missing_bucket_is_named_with_the_command_that_creates_it(
    bucket: GcsStore, tmp_path: Path
) -> None:
    source = write_files(tmp_path, a=b"a")
    bucket.upload(source, ["a"])
    (info,) = bucket.list_objects()
    missing = GcsStore("no-such-bucket", patience_s=5)
    for operation in (
        missing.list_objects,
        lambda: missing.find("a"),
        lambda: missing.upload(source, ["a"]),
        lambda: missing.download([info], tmp_path / "downloaded"),
        lambda: missing.delete("a"),
    ):
        with pytest.raises(StorageError, match="no bucket gs://no-such-bucket: make it") as raised:
            operation()
        assert "\n" not in str(raised.value)


def test_an_object_deleted_before_its_download_is_named(bucket: GcsStore, tmp_path: Path) -> None:
    bucket.upload(write_files(tmp_path / "source", a=b"a"), ["a"])
    objects = bucket.list_objects()
    bucket.delete("a")
    with pytest.raises(StorageError, match=f"{bucket.url}/a is not there: it was deleted"):
        bucket.download(objects, tmp_path / "downloaded")
    assert "a" not in contents(tmp_path / "downloaded")


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
        source = write_files(tmp_path, a=b"a")
        listed = ObjectInfo(key="a", size=1, generation="1")
        for operation in (
            store.list_objects,
            lambda: store.find("a"),
            lambda: store.upload(source, ["a"]),
            lambda: store.download([listed], tmp_path / "downloaded"),
        ):
            with pytest.raises(StorageError, match="credentials are refused or missing") as raised:
                operation()
            assert "gs://private/tiles" in str(raised.value)
            assert "GOOGLE_APPLICATION_CREDENTIALS" in str(raised.value)
            assert "\n" not in str(raised.value)


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
        write_files(
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
    source = write_files(tmp_path / "source", a=b"spotless", b=b"fine")
    bucket.upload(source, ["a", "b"])
    downloaded = write_files(tmp_path / "downloaded", a=b"old")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
    remote = open_store(bucket.url)
    proxy.spoil = (b"spotless", b"spotlest")
    with pytest.raises(StorageError, match=f"{bucket.url}/a came with crc32c .* the bucket says"):
        remote.download(remote.list_objects(), downloaded)
    assert (downloaded / "a").read_bytes() == b"old"
    proxy.spoil = (b"", b"")
    remote.download(remote.list_objects(), downloaded)
    assert contents(downloaded) == contents(source)


def test_an_object_overwritten_since_its_listing_is_not_downloaded(
    bucket: GcsStore, tmp_path: Path
) -> None:
    bucket.upload(write_files(tmp_path / "source", a=b"old"), ["a"])
    objects = bucket.list_objects()
    bucket.upload(write_files(tmp_path / "source", a=b"new"), ["a"])
    with pytest.raises(StorageError, match="run the command again"):
        bucket.download(objects, tmp_path / "downloaded")
    assert "a" not in contents(tmp_path / "downloaded")


def test_new_files_do_not_replace_existing_ones(
    servers: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a folder, and with the one emulator that supports generations."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", servers["fake-gcs-server"])
    (tmp_path / "store").mkdir()
    for root in (make_bucket(servers["fake-gcs-server"], "new"), str(tmp_path / "store")):
        store = open_store(root)
        source = write_files(tmp_path / "source", a=b"first")
        store.upload(source, ["a"], new=True)
        write_files(source, a=b"second")
        with pytest.raises(StorageError, match="a exists already"):
            store.upload(source, ["a"], new=True)
        store.download(store.list_objects(), tmp_path / "downloaded")
        assert contents(tmp_path / "downloaded") == {"a": b"first"}


@pytest.mark.parametrize("path", ["../a", "/a", "A/../../a"])
def test_a_key_that_leads_out_of_the_folder_is_refused(
    path: str, bucket: GcsStore, tmp_path: Path
) -> None:
    bucket.upload(write_files(tmp_path / "source", a=b"a"), ["a"])
    (info,) = bucket.list_objects()
    with pytest.raises(StorageError, match="leads out of"):
        bucket.download([replace(info, key=path)], tmp_path / "inner" / "downloaded")
    assert not (tmp_path / "inner").exists()


@pytest.mark.parametrize("root", ["gs://", "gs:///tiles"])
def test_an_address_without_a_bucket_is_refused(root: str) -> None:
    with pytest.raises(StorageError, match="names no bucket"):
        open_store(root)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=f"no folder {tmp_path}/none"):
        open_store(f"{tmp_path}/none")


def test_a_folder_that_cannot_be_written_is_named(bucket: GcsStore, tmp_path: Path) -> None:
    bucket.upload(write_files(tmp_path / "source", a=b"a"), ["a"])
    (tmp_path / "downloaded").write_text("a file where a folder should be")
    with pytest.raises(StorageError, match=f"{tmp_path}/downloaded.*: .*name another folder"):
        bucket.download(bucket.list_objects(), tmp_path / "downloaded")


def dataset(root: str, cache: Path, source: str = "folder") -> DataConfig:
    return from_mapping(DataConfig, {"source": source, "root": root, "cache": str(cache)}, "data")


def test_a_bucket_has_the_fingerprint_of_the_folder_that_was_uploaded(
    bucket: GcsStore, tmp_path: Path
) -> None:
    tiles = source_tiles(tmp_path / "tiles")
    bucket.upload(tiles, sorted(contents(tiles)))
    local = open_pack(dataset(str(tiles), tmp_path / "near"))
    remote = open_pack(dataset(bucket.url, tmp_path / "far"))
    assert remote.fingerprint == local.fingerprint
    again = open_pack(dataset(f"{bucket.url}/", tmp_path / "far"))
    assert again.directory == remote.directory, "nothing was downloaded, and nothing was read again"


def test_only_a_tile_that_changed_in_the_bucket_is_downloaded(
    bucket: GcsStore, tmp_path: Path
) -> None:
    tiles = source_tiles(tmp_path / "tiles")
    bucket.upload(tiles, sorted(contents(tiles)))
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
    local = open_pack(dataset(str(tiles), tmp_path / "near")).fingerprint
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
        assert open_pack(dataset(root, tmp_path / "far", source)).fingerprint == local


def test_an_empty_bucket_is_named_in_the_error(bucket: GcsStore, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"no tiles at {bucket.url}"):
        open_pack(dataset(bucket.url, tmp_path))
    with pytest.raises(DataError, match=f"no zip of tiles at {bucket.url}/none.zip"):
        open_pack(dataset(f"{bucket.url}/none.zip", tmp_path))


def source_tiles(root: Path) -> Path:
    """Write thirty procedural tiles as files; return the folder."""
    source = open_source(compose(["data=synthetic", "data.synthetic.tiles=30"]).data)
    for path in source.paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(source.read(path))
    return root
