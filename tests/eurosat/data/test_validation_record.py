"""The remedy for data that were never validated names the data set that was refused."""

import dataclasses
import shlex
from pathlib import Path

import pytest

from eurosat.config import DataConfig, SyntheticConfig, compose
from eurosat.data import validation_record
from eurosat.data.prepare import prepare
from eurosat.data.sources import open_source
from eurosat.data.validation_record import require_passed, validate_command
from eurosat.errors import DataError
from tests.support.recipes import TINY


@pytest.mark.parametrize(
    "overrides",
    [
        ["data=synthetic"],
        ["data=synthetic", "data.synthetic.tiles=200", "data.synthetic.size=32"],
        ["data=synthetic", "data.dtype=uint16", "data.synthetic.bands=13", "data.bands=rgb"],
        ["data=eurosat"],
        ["data=eurosat", "data.root=/elsewhere/EuroSAT_RGB.zip"],
        ["data=folder", "data.root='/my tiles'", "data.reflectance_max=10000"],
        ["data=folder", "data.root=gs://bucket/tiles", "data.cache=/large/disk"],
    ],
)
def test_the_remedy_composes_to_the_same_data(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EUROSAT_ROOT", "/data/eurosat")
    config = compose(overrides).data
    _, _, module, *arguments = shlex.split(validate_command(config))
    assert module == "expectations.validate"
    assert compose(arguments).data == config


def test_the_remedy_names_no_setting_that_has_its_default() -> None:
    command = validate_command(compose(["data=synthetic", "data.split_seed=3"]).data)
    assert command == "python -m expectations.validate data=synthetic"


def test_unvalidated_tiles_are_refused_with_the_command_for_their_size() -> None:
    config = compose([*TINY, "data.allow_unvalidated=false"]).data
    with pytest.raises(DataError, match=r"data=synthetic .*data\.synthetic\.tiles=200"):
        require_passed("0" * 64, config)


def test_synthetic_tiles_of_another_size_are_another_source() -> None:
    small = DataConfig(source="synthetic", synthetic=SyntheticConfig(tiles=20, size=32))
    (override,) = [
        word for word in shlex.split(validate_command(small)) if word.startswith("data.synthetic.s")
    ]
    assert override == "data.synthetic.size=32"
    assert open_source(small).identity != open_source(DataConfig(source="synthetic")).identity


def test_training_requires_a_validation_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = compose([*TINY, f"data.cache={tmp_path}", "data.allow_unvalidated=false"])
    with pytest.raises(DataError, match=r"was never validated: run `python -m expectations"):
        prepare(config)
    allowed = dataclasses.replace(config.data, allow_unvalidated=True)
    prepared = prepare(dataclasses.replace(config, data=allowed))
    assert prepared.validation == "missing"
    assert "training on it anyway" in caplog.text
    for success, state in ((False, "failed"), (True, "passed")):
        validation_record.write(
            validation_record.ValidationRecord(
                fingerprint=prepared.pack.fingerprint,
                success=success,
                expectations=2,
                failed=() if success else ("balance",),
                suite="s",
                validated_at="now",
            ),
            tmp_path,
        )
        if success:
            assert prepare(config).validation == state
        else:
            with pytest.raises(DataError, match="failed balance"):
                prepare(config)


@pytest.mark.parametrize("content", ["", "[]", '{"fingerprint": "x"}'])
def test_a_damaged_validation_record_is_refused(tmp_path: Path, content: str) -> None:
    file = validation_record.record_path("abc", tmp_path)
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(DataError, match="is not a validation record"):
        validation_record.read("abc", tmp_path)
