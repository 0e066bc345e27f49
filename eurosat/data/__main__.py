"""Commands for a data set: describe it, audit its duplicates, fetch, pack and split its tiles."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from eurosat.config import DataConfig, compose
from eurosat.data.pack import TABLE, Pack, open_pack
from eurosat.data.sources import SUFFIXES, Source, open_source
from eurosat.data.split import FOLDS, Split, make_split, split_csv
from eurosat.errors import ConfigError
from eurosat.runtime import atomic, cli, exit_codes
from eurosat.runtime.progress import track
from eurosat.storage import FolderStore, disk_errors

USAGE = """
usage: python -m eurosat.data describe|audit|fetch|pack|split [key=value ...]

  describe   plot class counts, example tiles, band histograms and duplicates; audit as well
  audit      list exact and near duplicates; exit 1 if any group is in two folds
  fetch      write the tiles as files, Class/file, into a folder; unchanged files are kept
  pack       build the pack; write its table (tiles.parquet) and summary (pack.json)
  split      write the fold of every tile as CSV, as a training run logs it

  data=synthetic|eurosat|folder   data.protocol=60/20/20   data.split_seed=0
  to=PATH    output folder; for split the output file
             (default reports/describe-SOURCE, data/tiles, data, data/split.csv)
"""
HISTOGRAM_BINS = 64
"""Bins of a band histogram: four grey levels each."""
MAX_EXAMPLES = 10
"""Tiles per class, and groups of duplicates, that are drawn."""


def describe(pack: Pack, split: Split, title: str, folder: Path) -> list[Path]:
    """Draw the exploratory plots into ``folder``; return their files."""
    from eurosat.evaluation import plots

    folder.mkdir(parents=True, exist_ok=True)
    rows_by_class = {name: np.flatnonzero(pack.table["class"] == name) for name in pack.classes}
    counts = {
        name: {fold: int((split.folds[rows] == fold).sum()) for fold in FOLDS}
        for name, rows in rows_by_class.items()
    }
    plots.class_counts(counts, f"{title}: tiles per class and fold", folder / "counts.png")
    examples = {
        name: pack.tiles_NHWC[rows[:: max(1, len(rows) // MAX_EXAMPLES)][:MAX_EXAMPLES]]
        for name, rows in rows_by_class.items()
    }
    plots.contact_sheet(examples, f"{title}: tiles of each class", folder / "tiles.png")
    histograms, means = {}, {}
    for name, rows in rows_by_class.items():
        pixels = pack.tiles_NHWC[rows].reshape(-1, pack.bands)
        histograms[name] = histogram(pixels)
        means[name] = pixels.mean(axis=0, dtype=np.float64)
    plots.band_histograms(
        histograms, means, f"{title}: levels of each band, and mean colour", folder / "bands.png"
    )
    files = [folder / name for name in ("counts.png", "tiles.png", "bands.png")]
    if groups := duplicate_groups(pack):
        tiles_by_paths = {
            ", ".join(pack.table["path"].iloc[rows[:MAX_EXAMPLES]]): pack.tiles_NHWC[
                rows[:MAX_EXAMPLES]
            ]
            for rows in groups[:MAX_EXAMPLES]
        }
        files.append(folder / "duplicates.png")
        plots.contact_sheet(tiles_by_paths, f"{title}: duplicates", files[-1])
    return files


def histogram(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Return (C, HISTOGRAM_BINS) shares of the (n, C) ``pixels`` in each bin."""
    width = 256 // HISTOGRAM_BINS
    counts = [np.bincount(band // width, minlength=HISTOGRAM_BINS) for band in pixels.T]
    return np.stack(counts) / len(pixels)


def duplicate_groups(pack: Pack) -> list[npt.NDArray[np.int64]]:
    """Return the row numbers of each group of two or more duplicates."""
    group = pack.table["group"].to_numpy(np.int64)
    ids, sizes = np.unique(group, return_counts=True)
    return [np.flatnonzero(group == group_id) for group_id in ids[sizes > 1]]


def audit(pack: Pack, split: Split) -> int:
    """Print every group of duplicates with its folds; return how many groups are in two folds."""
    num_leaks = 0
    groups = duplicate_groups(pack)
    for rows in groups:
        folds = sorted(set(split.folds[rows]))
        num_leaks += len(folds) > 1
        status = "LEAK in" if len(folds) > 1 else "same fold"
        print(f"{status} {'/'.join(folds)}: {', '.join(pack.table['path'].iloc[rows])}")
    print(
        f"{len(pack.table)} tiles: {pack.num_exact_duplicates} exact and "
        f"{pack.num_near_duplicates} near duplicates in {len(groups)} groups; "
        f"groups in two folds: {num_leaks}"
    )
    return num_leaks


def fetch(source: Source, folder: Path) -> int:
    """Make ``folder`` contain exactly the tiles of ``source``; return how many were written.

    Raises:
        ConfigError: the folder contains a file that is not a tile, which would be deleted.
    """
    target, num_written = FolderStore(folder), 0
    obsolete = {info.key for info in target.list_objects()} - {*source.paths}
    for path in sorted(obsolete):
        if path.count("/") != 1 or Path(path).suffix.lower() not in SUFFIXES:
            raise ConfigError(
                f"{folder} contains {path}, which is not a tile: fetch to another folder"
            )
    for path in track(source.paths, len(source.paths), "fetching tiles", "tiles"):
        data, file = source.read(path), target.file(path)
        with disk_errors(file):
            if not file.exists() or file.read_bytes() != data:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)  # a truncated file differs, so the next fetch rewrites it
                num_written += 1
    for path in obsolete:
        target.delete(path)
    return num_written


def write_pack_summary(pack: Pack, folder: Path) -> None:
    """Write the pack's table (tiles.parquet) and summary (pack.json), for a version of the data."""
    counts = pack.table["class"].value_counts().sort_index()
    summary = {
        "fingerprint": pack.fingerprint,
        "tiles": len(pack.table),
        "classes": {str(name): int(count) for name, count in counts.items()},
        "shape": list(pack.tiles_NHWC.shape[1:]),
        "duplicates": {"exact": pack.num_exact_duplicates, "near": pack.num_near_duplicates},
    }
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        pack.table.to_parquet(folder / TABLE, index=False)
        atomic.atomic_write_text(folder / "pack.json", json.dumps(summary, indent=1) + "\n")


def main(argv: Sequence[str]) -> int:
    command, *rest = argv or ["--help"]
    overrides = cli.overrides([command] if command.startswith("-") else rest, USAGE)
    if command not in COMMANDS:
        raise ConfigError(f"{command!r} is not one of {', '.join(COMMANDS)}")
    targets = [option.removeprefix("to=") for option in overrides if option.startswith("to=")]
    config = compose([option for option in overrides if not option.startswith("to=")])
    return COMMANDS[command](config.data, targets[0] if targets else None)


def _describe_command(config: DataConfig, target: str | None) -> int:
    pack, split = _open_pack_and_split(config)
    audit(pack, split)
    folder = Path(target or f"reports/describe-{config.source}")
    for file in describe(pack, split, config.source, folder):
        print(file)
    return exit_codes.OK


def _audit_command(config: DataConfig, target: str | None) -> int:
    pack, split = _open_pack_and_split(config)
    return exit_codes.NEGATIVE if audit(pack, split) else exit_codes.OK


def _fetch_command(config: DataConfig, target: str | None) -> int:
    source = open_source(config)
    num_written = fetch(source, Path(target or "data/tiles"))
    print(f"{len(source.paths)} tiles, {num_written} written")
    return exit_codes.OK


def _pack_command(config: DataConfig, target: str | None) -> int:
    write_pack_summary(_open_pack(config), Path(target or "data"))
    return exit_codes.OK


def _split_command(config: DataConfig, target: str | None) -> int:
    pack, split = _open_pack_and_split(config)
    file = Path(target or "data/split.csv")
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.atomic_write_text(file, split_csv(pack.table, split))
    return exit_codes.OK


def _open_pack(config: DataConfig) -> Pack:
    pack = open_pack(config)
    print(f"data {pack.fingerprint}")
    return pack


def _open_pack_and_split(config: DataConfig) -> tuple[Pack, Split]:
    pack = _open_pack(config)
    split = make_split(pack.table, *config.split_options)
    print(f"split {split.fingerprint} ({split.protocol}, seed {split.seed})")
    return pack, split


COMMANDS: dict[str, Callable[[DataConfig, str | None], int]] = {
    "describe": _describe_command,
    "audit": _audit_command,
    "fetch": _fetch_command,
    "pack": _pack_command,
    "split": _split_command,
}


if __name__ == "__main__":
    cli.run_command(main)
