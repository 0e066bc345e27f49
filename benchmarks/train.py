"""bench-train: training speed against a plain loop, torchgeo and the bare step, in turns.

`python -m benchmarks.train [--torchgeo PYTHON] [--rounds 5] [--seconds 12]`
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import reports
from eurosat.config import compose
from eurosat.data.prepare import PreparedData, prepare
from eurosat.data.sources import open_source
from eurosat.models.compute import has_bf16
from eurosat.runtime import logs
from eurosat.runtime.progress import track

DESCRIPTIONS = {
    "plain": "Lightning, ImageFolder, transforms per image, 2 workers",
    "plain-bf16": "the same with bf16 and channels_last",
    "torchgeo": "torchgeo's ClassificationTask and data module, 2 workers",
    "ours": "this project, with augmentation, moving average and tracking",
    "ceiling": "the step alone on random tensors",
}


def write_tiles(folder: Path, *, geotiff: bool) -> int:
    """Write the train fold as JPEG, and as GeoTIFF if asked; return the number of tiles."""
    config = compose(["data=eurosat", "data.allow_unvalidated=true"])
    data, source = prepare(config), open_source(config.data)
    rows = data.split.indices("train")
    for row in track(rows, len(rows), "writing the tiles for the other libraries", "tiles"):
        path = data.pack.table["path"].iloc[row]
        (folder / "jpeg" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "jpeg" / path).write_bytes(source.read(path))
    if geotiff:
        write_geotiffs(data, folder / "geotiff")
    return len(rows)


def write_geotiffs(data: PreparedData, folder: Path) -> None:
    """Write the train fold where torchgeo expects it, as each of its folds."""
    import rasterio

    tif = folder / "ds/images/remote_sensing/otherDatasets/sentinel_2/tif"
    names = []
    for row in data.split.indices("train"):
        file = (tif / data.pack.table["path"].iloc[row]).with_suffix(".tif")
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels_CHW = np.moveaxis(data.pack.tiles_NHWC[row], -1, 0)
        with rasterio.open(
            file,
            "w",
            driver="GTiff",
            dtype="uint16",
            count=3,
            height=pixels_CHW.shape[1],
            width=pixels_CHW.shape[2],
        ) as opened:
            opened.write(pixels_CHW.astype(np.uint16))
        names.append(file.with_suffix(".jpg").name)
    for split in ("train", "val", "test"):
        (folder / f"eurosat-{split}.txt").write_text("\n".join(names))


@contextmanager
def started_arm(
    name: str, python: str, folder: Path, log_name: str = ""
) -> Iterator["subprocess.Popen[str]"]:
    """Start an arm's process, wait until it is ready to train, and kill it at the end."""
    log_file = folder / f"{log_name or name}.log"
    environment = os.environ | {"PYTHONPATH": str(reports.ROOT), "EUROSAT_PROGRESS": "lines"}
    with log_file.open("w") as log:
        process = subprocess.Popen(
            [python, "-m", "benchmarks.train_arms", name, str(folder)],
            cwd=reports.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        try:
            if not read_message(process).get("ready"):
                sys.exit(f"error: arm {name} did not start:\n{log_file.read_text()[-2000:]}")
            print(f"{name} is ready", flush=True)
            yield process
        finally:
            process.kill()
            process.wait()


def read_message(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """Return the next JSON line of an arm, skipping its other output; empty at its end."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            message: dict[str, Any] = json.loads(line)
            return message
    return {}


def run_turn(process: "subprocess.Popen[str]", seconds: float) -> dict[str, Any]:
    """Let an arm train for ``seconds``; return its images, seconds and private_gb."""
    assert process.stdin is not None
    process.stdin.write(f"go {seconds}\n")
    process.stdin.flush()
    return read_message(process)


def measure(
    names: Sequence[str], pythons: dict[str, str], folder: Path, rounds: int, seconds: float
) -> dict[str, list[dict[str, Any]]]:
    """Return the turns of each arm, one per round; the order shifts by one in each round."""
    with ExitStack() as stack:
        arms = {
            name: stack.enter_context(started_arm(name, pythons[name], folder)) for name in names
        }
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for number in range(rounds):
            shift = number % len(names)
            for name in [*names[shift:], *names[:shift]]:
                turn = run_turn(arms[name], seconds)
                turns[name].append(turn)
                rate = turn["images"] / turn["seconds"]
                print(f"round {number + 1} of {rounds}: {name} {rate:,.0f} images/s", flush=True)
    return turns


def shared_pack_fraction(python: str, folder: Path, seconds: float) -> float:
    """Return the share of the pack's pages that two parallel trainings have in common.

    The lower one of both processes; 0 if one has a copy of its own and no mapping of the file.
    """
    with (
        started_arm("ours", python, folder, "first") as first,
        started_arm("ours", python, folder, "second") as second,
    ):
        for process in (first, second):
            run_turn(process, seconds)
        shares = []
        for process in (first, second):
            sizes_kb = mapping_kb(process.pid, "tiles.npy")
            rss_kb = sizes_kb["Rss"]
            shares.append(sizes_kb["Shared_Clean"] / rss_kb if rss_kb else 0.0)
    return min(shares)


def mapping_kb(pid: int, file: str) -> Counter[str]:
    """Return the sizes in /proc/PID/smaps of a file's mappings: Rss, Shared_Clean and others."""
    total: Counter[str] = Counter()
    in_mapping = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if " " in name:  # first line of a mapping: addresses, rights, file
            in_mapping = line.endswith(file)
        elif in_mapping and rest.endswith("kB"):
            total[name] += int(rest.split()[0])
    return total


def goals_of(
    turns: dict[str, list[dict[str, Any]]],
    speeds: dict[str, list[float]],
    tiles: int,
    shared_fraction: float,
) -> list[dict[str, Any]]:
    def against(name: str) -> float:
        return reports.median_ratio(speeds["ours"], speeds[name])

    plain_goal = 3.5 if has_bf16() else 2.2
    goals = [
        reports.goal("train.vs_plain_lightning", against("plain"), plain_goal),
        reports.goal("train.private_gb", turns["ours"][-1]["private_gb"], 1.5, at_most=True),
        reports.goal("train.pack_shared", shared_fraction, 0.95),
    ]
    if torch.cuda.is_available():
        epoch_s = tiles / statistics.median(speeds["ours"])
        goals.append(reports.goal("train.gpu_vs_ceiling", against("ceiling"), 0.9))
        goals.append(reports.goal("train.gpu_epoch_s", epoch_s, 2, at_most=True))
    else:
        goals.append(reports.goal("train.vs_ceiling", against("ceiling"), 0.92))
    if "torchgeo" in speeds:
        goals.append(reports.goal("train.vs_torchgeo", against("torchgeo"), 3.5))
    return goals


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torchgeo", help="python of an environment with torchgeo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=12, help="length of a turn")
    args = parser.parse_args(argv)
    logs.setup("info")
    names = [name for name in DESCRIPTIONS if name != "torchgeo" or args.torchgeo]
    pythons = dict.fromkeys(names, sys.executable)
    if args.torchgeo:
        pythons["torchgeo"] = args.torchgeo
    started = reports.now()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tiles = write_tiles(folder, geotiff=bool(args.torchgeo))
        turns = measure(names, pythons, folder, args.rounds, args.seconds)
        shared_fraction = shared_pack_fraction(sys.executable, folder, args.seconds)
    speeds = {
        name: [turn["images"] / turn["seconds"] for turn in arm] for name, arm in turns.items()
    }
    rows = [
        reports.speed(name, speeds[name])
        | {
            "ours_is_times": round(reports.median_ratio(speeds["ours"], speeds[name]), 2),
            "private_gb": round(turns[name][-1]["private_gb"], 2),
            "what": DESCRIPTIONS[name],
        }
        for name in names
    ]
    reports.write(
        "train-gpu" if torch.cuda.is_available() else "train",
        started=started,
        n=args.rounds,
        goals=goals_of(turns, speeds, tiles, shared_fraction),
        rows=rows,
        tiles=tiles,
        seconds_per_turn=args.seconds,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
