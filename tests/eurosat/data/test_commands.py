"""The commands of `python -m eurosat.data`."""

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

SYNTHETIC = [option for option in TINY if option.startswith("data")]


def test_describe_draws_plots_of_the_data_set(
    tiny_pack: Pack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.main(["describe", *SYNTHETIC, f"to={tmp_path}"]) == exit_codes.OK
    printed = capsys.readouterr().out
    assert tiny_pack.fingerprint in printed
    for name in ("counts", "tiles", "bands"):
        with Image.open(tmp_path / f"{name}.png") as plot:
            assert min(plot.size) > 200
            assert len(plot.convert("RGB").getcolors(1_000_000) or []) > 10, "not blank"
        assert f"{name}.png" in printed


def write_tiles_with_a_duplicate(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("Forest", "River"):
        (root / name).mkdir(parents=True)
        for index in range(12):
            pixels = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index:02}.png")
    original = (root / "Forest" / "00.png").read_bytes()
    (root / "Forest" / "99.png").write_bytes(original)
    return root


def test_audit_lists_duplicates_with_their_fold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_tiles_with_a_duplicate(tmp_path / "tiles")
    overrides = ["data=folder", f"data.root={root}"]
    assert commands.main(["audit", *overrides]) == exit_codes.OK
    printed = capsys.readouterr().out
    assert "Forest/00.png, Forest/99.png" in printed
    assert "25 tiles: 1 exact and 0 near duplicates in 1 groups; groups in two folds: 0" in printed
    assert commands.main(["describe", *overrides, f"to={tmp_path / 'plots'}"]) == exit_codes.OK
    assert (tmp_path / "plots" / "duplicates.png").exists()


def test_audit_counts_a_duplicate_across_folds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    from eurosat.config import DataConfig
    from eurosat.data.pack import open_pack

    root = write_tiles_with_a_duplicate(tmp_path / "tiles")
    pack = open_pack(DataConfig(source="folder", root=str(root), cache=str(tmp_path / "cache")))
    split = make_split(pack.table)
    folds = split.folds.copy()
    folds[list(pack.table["path"]).index("Forest/99.png")] = "leak"
    assert commands.audit(pack, replace(split, folds=folds)) == 1
    assert "LEAK in leak/" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["draw"], ["seed=1"]])
def test_an_unknown_command_is_refused_by_name(argv: list[str]) -> None:
    with pytest.raises(ConfigError, match="is not one of describe, audit"):
        commands.main(argv)


@pytest.mark.parametrize("argv", [[], ["--help"], ["describe", "--help"]])
def test_help_lists_the_commands(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        commands.main(argv)
    assert caught.value.code == 0
    assert "describe|audit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pixels", "level"), [(np.zeros((5, 3), np.uint8), 0), (np.full((5, 3), 255, np.uint8), 63)]
)
def test_a_histogram_holds_the_share_of_each_bin(pixels: np.ndarray, level: int) -> None:
    shares = commands.histogram(pixels)
    assert shares.shape == (3, commands.HISTOGRAM_BINS)
    assert shares[:, level].tolist() == [1, 1, 1]
