"""Versions of the data, end to end: DVC, our commands, and an emulator's bucket."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from eurosat import train
from eurosat.config import compose
from eurosat.data import __main__ as commands
from eurosat.data.pack import Pack
from eurosat.data.prepare import prepare
from eurosat.data.sources import open_source
from eurosat.data.split import split_csv
from eurosat.errors import EuroSATError
from eurosat.storage import open_store
from expectations import validate
from tests.support.mlflow_server import free_port
from tests.support.object_stores import fake_gcs_server, make_bucket
from tests.support.recipes import TINY

ROOT = Path(__file__).resolve().parents[1]
STAGES = {"fetch", "pack", "validate", "split"}
VERSIONED = (
    ".dvc/config",
    ".dvc/.gitignore",
    ".dvcignore",
    "dvc.yaml",
    "params.yaml",
    "Makefile",
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache for these tests alone: other tests rely on tiles that were never validated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EUROSAT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with (
        fake_gcs_server(tmp_path_factory.mktemp("objects")) as url,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        yield url


@pytest.fixture(scope="module")
def tiles(server: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of two hundred procedural tiles in a bucket."""
    folder = tmp_path_factory.mktemp("tiles")
    overrides = [override for override in TINY if override.startswith("data.synthetic")]
    commands.fetch(open_source(compose(["data=synthetic", *overrides]).data), folder)
    bucket = make_bucket(server, "tiles")
    store = open_store(f"{bucket}/tiles")
    store.upload(folder, sorted(f"{file.parent.name}/{file.name}" for file in folder.glob("*/*")))
    return f"{bucket}/tiles"


class Versions:
    """A git repository with our DVC pipeline, whose tiles are in a bucket."""

    def __init__(self, folder: Path, tiles: str) -> None:
        self.folder = folder
        for name in VERSIONED:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        for name in ("eurosat", "expectations"):
            (folder / name).symlink_to(ROOT / name)
        self.set_params(
            source=f"data=folder data.root={tiles}", tiles="data=folder data.root=data/tiles"
        )
        self.run("git", "init", "--quiet")

    def set_params(self, **params: str) -> None:
        file = self.folder / "params.yaml"
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | params))

    def run(self, *command: str, code: int = 0) -> str:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = os.environ | {"PATH": path, "MAKEFLAGS": ""}
        result = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True
        )
        output = result.stdout + result.stderr
        assert result.returncode == code, output
        return output

    def make(self, *words: str, code: int = 0) -> str:
        """Run a target of the Makefile, with the present environment instead of a fresh one."""
        bin_folder = f"BIN={Path(sys.executable).parent}"
        return self.run("make", "-o", ".venv/dev", bin_folder, *words, code=code)

    def repro(self) -> set[str]:
        """Run the pipeline; return the stages that ran."""
        lines = self.make("data").splitlines()
        return {line.split("'")[1] for line in lines if line.startswith("Running stage")}

    @property
    def locked(self) -> dict[str, str]:
        return locked(self.folder / "dvc.lock")


def locked(lock: Path) -> dict[str, str]:
    """Return the data's fingerprint in the lock of each stage that depends on it."""
    stages = yaml.safe_load(lock.read_text())["stages"]
    params_by_stage = {name: stage.get("params", {}) for name, stage in stages.items()}
    return {
        name: params["data/pack.json"]["fingerprint"]
        for name, params in params_by_stage.items()
        if "data/pack.json" in params
    }


@pytest.fixture(scope="module")
def versions(tiles: str, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Versions:
    repository = Versions(tmp_path_factory.mktemp("versions"), tiles)
    assert repository.repro() == STAGES
    return repository


def test_a_data_version_is_pushed_and_pulled_unchanged(versions: Versions, server: str) -> None:
    count = len(list((versions.folder / "data/tiles").glob("*/*")))
    names = ("pack.json", "tiles.parquet", "split.csv", "validation.json")
    written = {name: (versions.folder / "data" / name).read_bytes() for name in names}
    bucket = make_bucket(server, "versions")
    versions.make("dvc-remote", f"EUROSAT_BUCKET={bucket.removeprefix('gs://')}")
    assert f"{bucket}/versions" in (versions.folder / ".dvc/config.local").read_text()
    versions.make("data-push")
    shutil.rmtree(versions.folder / "data")
    shutil.rmtree(versions.folder / ".dvc/cache")
    versions.make("data-pull")
    assert len(list((versions.folder / "data/tiles").glob("*/*"))) == count == 200
    for name, content in written.items():
        assert (versions.folder / "data" / name).read_bytes() == content


def test_the_lock_has_the_fingerprint_that_a_training_run_is_tagged_with(
    versions: Versions, tiles: str
) -> None:
    ready = prepare(compose(["data=folder", f"data.root={tiles}"]))
    fingerprint = ready.tags["data.fingerprint"]
    assert ready.validation == "passed", "the stage has written the record that training requires"
    assert versions.locked == {"validate": fingerprint, "split": fingerprint}
    summary = json.loads((versions.folder / "data/pack.json").read_text())
    assert summary["fingerprint"] == fingerprint
    expected = split_csv(ready.pack.table, ready.split)
    assert (versions.folder / "data/split.csv").read_text() == expected


def test_a_change_runs_only_the_stages_that_depend_on_it(
    versions: Versions, tiles: str, tmp_path: Path
) -> None:
    before = versions.locked
    versions.set_params(split="data.protocol=60/20/20 data.split_seed=1")
    assert versions.repro() == {"fetch", "split"}, "the source has nothing new"
    store = open_store(tiles)
    info = next(info for info in store.list_objects() if info.key.startswith("River/"))
    store.download([info], tmp_path)
    file = tmp_path / info.key
    file.write_bytes(file.read_bytes() + b"\0")  # other bytes, the same picture
    store.upload(tmp_path, [info.key])
    assert versions.repro() == STAGES
    assert set(versions.locked.values()).isdisjoint(before.values())
    assert (versions.folder / "data/tiles" / info.key).read_bytes() == file.read_bytes()


@pytest.mark.real_data
def test_the_committed_lock_has_the_fingerprint_of_the_real_tiles(real_pack: Pack) -> None:
    fingerprint = real_pack.fingerprint
    assert locked(ROOT / "dvc.lock") == {"validate": fingerprint, "split": fingerprint}


@pytest.mark.slow
def test_a_push_without_a_configured_bucket_is_refused(versions: Versions) -> None:
    (versions.folder / ".dvc/config.local").unlink(missing_ok=True)
    output = versions.make("data-push", code=2)
    assert "set-EUROSAT_BUCKET-and-run-make-dvc-remote" in output
    assert "which bucket?" in versions.make("dvc-remote", code=2)


@pytest.mark.slow
def test_a_tile_deleted_from_the_bucket_is_deleted_from_the_version(
    versions: Versions, tiles: str
) -> None:
    store = open_store(tiles)
    deleted = store.list_objects()[0].key
    store.delete(deleted)
    assert versions.repro() == STAGES
    assert not (versions.folder / "data/tiles" / deleted).exists()


@pytest.mark.slow
def test_data_that_fail_validation_do_not_become_a_version(
    tiles: str, store: Path, tmp_path: Path
) -> None:
    broken = Versions(tmp_path, tiles)
    reference = {"classes": {"Forest": 1, "Tundra": 5}}
    (tmp_path / "reference.json").write_text(json.dumps(reference))
    text = (tmp_path / "dvc.yaml").read_text()
    (tmp_path / "dvc.yaml").write_text(text.replace("report=", "reference=reference.json report="))
    output = broken.make("data", code=2)
    assert "expectations failed" in output
    assert "failed to reproduce 'validate'" in output


@pytest.mark.slow
def test_tiles_in_a_bucket_can_be_validated_and_trained_on(
    tiles: str, tracking_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EUROSAT_CACHE", str(tmp_path / "cache"))
    data = ["data=folder", f"data.root={tiles}"]
    assert validate.main([*data, "report=validated/verdict.json"]) == 0
    verdict = json.loads(Path("validated/verdict.json").read_text())
    assert verdict["success"]
    recipe = [override for override in TINY if not override.startswith("data")]
    assert train.main([*data, *recipe, "trainer.epochs=1"]) == 0
    (run,) = MlflowClient().search_runs(["1"], "tags.kind = 'train'")
    assert run.data.tags["data.fingerprint"] == verdict["fingerprint"]
    assert run.data.tags["data.validation"] == "passed"


def test_a_target_that_is_not_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(EuroSATError, match="taken"):
        commands.main(
            ["fetch", "data=synthetic", "data.synthetic.tiles=10", f"to={tmp_path}/taken"]
        )


def test_a_bucket_that_cannot_be_reached_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)  # it would take precedence
    versions = Versions(tmp_path, "gs://tiles/tiles")
    versions.make("dvc-remote", "EUROSAT_BUCKET=versions")
    (tmp_path / ".platform").mkdir()
    (tmp_path / ".platform/env").write_text(
        f"STORAGE_EMULATOR_HOST=http://127.0.0.1:{free_port()}\n"
    )
    output = versions.make("data-push", code=2)
    assert "cannot write in gs://versions/versions" in output
    assert "Traceback" not in output
