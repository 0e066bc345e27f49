"""The verbs that look at a data set."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eurosat.data import __main__ as commands
from eurosat.data.pack import Pack
from eurosat.data.split import make_split
from eurosat.errors import ConfigError
from eurosat.runtime import exit_codes
from tests.support.recipes import TINY

SYNTHETIC = [one for one in TINY if one.startswith("data")]


def test_describe_draws_the_data_set(
    tiny_pack: Pack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.main(["describe", *SYNTHETIC, f"to={tmp_path}"]) == exit_codes.OK
    said = capsys.readouterr().out
    assert tiny_pack.fingerprint in said
    for name in ("counts", "tiles", "bands"):
        with Image.open(tmp_path / f"{name}.png") as figure:
            assert min(figure.size) > 200
            assert len(figure.convert("RGB").getcolors(1_000_000) or []) > 10, "not blank"
        assert f"{name}.png" in said


def folder_with_duplicates(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("Forest", "River"):
        (root / name).mkdir(parents=True)
        for index in range(12):
            pixels = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index:02}.png")
    copied = (root / "Forest" / "00.png").read_bytes()
    (root / "Forest" / "99.png").write_bytes(copied)
    return root


def test_audit_lists_duplicates_and_where_they_stand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder_with_duplicates(tmp_path / "tiles")
    given = ["data=folder", f"data.root={root}"]
    assert commands.main(["audit", *given]) == exit_codes.OK
    said = capsys.readouterr().out
    assert "Forest/00.png, Forest/99.png" in said
    assert "25 tiles: 1 exact and 0 near duplicates in 1 groups, 0 across folds" in said
    assert commands.main(["describe", *given, f"to={tmp_path / 'figures'}"]) == exit_codes.OK
    assert (tmp_path / "figures" / "duplicates.png").exists()


def test_a_duplicate_across_folds_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    from eurosat.config import DataConfig
    from eurosat.data.pack import open_pack

    root = folder_with_duplicates(tmp_path / "tiles")
    pack = open_pack(DataConfig(source="folder", root=str(root), cache=str(tmp_path / "cache")))
    split = make_split(pack.table)
    torn = split.folds.copy()
    torn[list(pack.table["path"]).index("Forest/99.png")] = "leak"
    assert commands.audit(pack, replace(split, folds=torn)) == 1
    assert "CROSSES" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["draw"], ["seed=1"]])
def test_a_word_that_is_no_verb_is_named(argv: list[str]) -> None:
    with pytest.raises(ConfigError, match="is not one of describe, audit"):
        commands.main(argv)


@pytest.mark.parametrize("argv", [[], ["--help"], ["describe", "--help"]])
def test_help_tells_the_verbs(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        commands.main(argv)
    assert caught.value.code == 0
    assert "describe|audit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pixels", "level"), [(np.zeros((5, 3), np.uint8), 0), (np.full((5, 3), 255, np.uint8), 63)]
)
def test_a_histogram_holds_shares(pixels: np.ndarray, level: int) -> None:
    shares = commands.histogram(pixels)
    assert shares.shape == (3, commands.HISTOGRAM_BINS)
    assert shares[:, level].tolist() == [1, 1, 1]
