"""Look at a data set: what is in it, how it is split, what leaks. Write it out as a version."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from eurosat.config import compose
from eurosat.data.pack import TABLE, Pack, open_pack
from eurosat.data.sources import SUFFIXES, Source, open_source
from eurosat.data.split import FOLDS, Split, make_split, split_csv
from eurosat.errors import ConfigError
from eurosat.runtime import atomic, cli, exit_codes
from eurosat.runtime.progress import track
from eurosat.storage import FolderStore, disk_errors

USAGE = """
usage: python -m eurosat.data describe|audit|fetch|pack|split [key=value ...]

  describe   draw class counts, a contact sheet, band histograms and the duplicates found
  audit      find exact and near duplicates and check that none crosses a fold (exit 1 if one does)
  fetch      make a folder hold the tiles as files, Class/file; what is right there stays
  pack       build the pack, and write its table (tiles.parquet) and fingerprint (pack.json)
  split      write the fold of every tile (CSV), as a training run logs it

  data=synthetic|eurosat|folder   data.protocol=60/20/20   data.split_seed=0
  to=PATH    folder for what is written, of split the file
             (reports/describe-SOURCE, data/tiles, data, data/split.csv)
"""
HISTOGRAM_BINS = 64
"""Bins of a band histogram: four grey levels each."""
COMMANDS = ("describe", "audit", "fetch", "pack", "split")
SHOWN = 10
"""Tiles per class on the contact sheet, and groups of duplicates drawn."""


def describe(pack: Pack, split: Split, title: str, folder: Path) -> list[Path]:
    """Draw the exploratory figures into ``folder``."""
    from eurosat.evaluation import plots

    folder.mkdir(parents=True, exist_ok=True)
    of_class = {name: np.flatnonzero(pack.table["class"] == name) for name in pack.classes}
    counts = {
        name: {fold: int((split.folds[rows] == fold).sum()) for fold in FOLDS}
        for name, rows in of_class.items()
    }
    plots.class_counts(counts, f"{title}: tiles per class and fold", folder / "counts.png")
    sheet = {
        name: pack.tiles_NHWC[rows[:: max(1, len(rows) // SHOWN)][:SHOWN]]
        for name, rows in of_class.items()
    }
    plots.contact_sheet(sheet, f"{title}: tiles of each class", folder / "tiles.png")
    shares, means = {}, {}
    for name, rows in of_class.items():
        pixels = pack.tiles_NHWC[rows].reshape(-1, pack.bands)
        shares[name] = histogram(pixels)
        means[name] = pixels.mean(axis=0, dtype=np.float64)
    plots.band_histograms(
        shares, means, f"{title}: levels of each band, and the mean colour", folder / "bands.png"
    )
    drawn = [folder / name for name in ("counts.png", "tiles.png", "bands.png")]
    if groups := duplicate_groups(pack):
        rows_of = {
            ", ".join(pack.table["path"].iloc[group[:SHOWN]]): pack.tiles_NHWC[group[:SHOWN]]
            for group in groups[:SHOWN]
        }
        plots.contact_sheet(rows_of, f"{title}: duplicates", folder / "duplicates.png")
        drawn.append(folder / "duplicates.png")
    return drawn


def histogram(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """(C, LEVELS) share of the pixels, (n, C), in each level."""
    width = 256 // HISTOGRAM_BINS
    counts = [np.bincount(band // width, minlength=HISTOGRAM_BINS) for band in pixels.T]
    return np.stack(counts) / len(pixels)


def duplicate_groups(pack: Pack) -> list[npt.NDArray[np.int64]]:
    """Row numbers of each group of exact or near duplicates."""
    group = pack.table["group"].to_numpy(np.int64)
    names, sizes = np.unique(group, return_counts=True)
    return [np.flatnonzero(group == name) for name in names[sizes > 1]]


def audit(pack: Pack, split: Split) -> int:
    """Print every group of duplicates with its fold; the number of groups that cross folds."""
    crossing = 0
    groups = duplicate_groups(pack)
    for rows in groups:
        folds = sorted(set(split.folds[rows]))
        crossing += len(folds) > 1
        print(
            f"{'CROSSES' if len(folds) > 1 else 'together'} in {'/'.join(folds)}: "
            + ", ".join(pack.table["path"].iloc[rows])
        )
    print(
        f"{len(pack.table)} tiles: {pack.num_exact_duplicates} exact and "
        f"{pack.num_near_duplicates} near duplicates in "
        f"{len(groups)} groups, {crossing} across folds"
    )
    return crossing


def fetch(source: Source, folder: Path) -> int:
    """Make ``folder`` hold the tiles of ``source``, and no others; returns how many were written.

    Raises:
        ConfigError: the folder holds something else than tiles, which would be lost.
    """
    here, written = FolderStore(folder), 0
    there = {info.key for info in here.list_objects()}
    for path in sorted(there - {*source.paths}):
        if path.count("/") != 1 or Path(path).suffix.lower() not in SUFFIXES:
            raise ConfigError(f"{folder} holds {path}, which is no tile: fetch to another folder")
    for path in track(source.paths, len(source.paths), "fetching tiles", "tiles"):
        data, file = source.read(path), here.file(path)
        with disk_errors(file):
            if not file.exists() or file.read_bytes() != data:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)  # cut short, it differs, and is written by the next fetch
                written += 1
    for path in there - {*source.paths}:
        here.delete(path)
    return written


def write_pack_summary(pack: Pack, folder: Path) -> None:
    """What a version says of its tiles: one row each, and how many there are of what."""
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
    verb, *rest = argv or ["--help"]
    given = cli.overrides([verb] if verb.startswith("-") else rest, USAGE)
    if verb not in COMMANDS:
        raise ConfigError(f"{verb!r} is not one of {', '.join(COMMANDS)}")
    target = next((one.removeprefix("to=") for one in given if one.startswith("to=")), None)
    config = compose([one for one in given if not one.startswith("to=")])
    if verb == "fetch":
        source = open_source(config.data)
        written = fetch(source, Path(target or "data/tiles"))
        print(f"{len(source.paths)} tiles, {written} written")
        return exit_codes.OK
    pack = open_pack(config.data)
    print(f"data {pack.fingerprint}")
    if verb == "pack":
        write_pack_summary(pack, Path(target or "data"))
        return exit_codes.OK
    split = make_split(pack.table, *config.data.split_options)
    print(f"split {split.fingerprint} ({split.protocol}, seed {split.seed})")
    if verb == "split":
        file = Path(target or "data/split.csv")
        with disk_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic.atomic_write_text(file, split_csv(pack.table, split))
        return exit_codes.OK
    crossing = audit(pack, split)
    if verb == "audit":
        return exit_codes.NEGATIVE if crossing else exit_codes.OK
    name = config.data.source
    for file in describe(pack, split, name, Path(target or f"reports/describe-{name}")):
        print(file)
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
