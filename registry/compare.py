"""Two versions side by side on one HTML page, with the tiles on which they differ."""

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eurosat.errors import ConfigError, EuroSATError, ModelError
from eurosat.runtime import cli, exit_codes, logs, templates
from registry import card, evidence, versions
from registry.gates import DifferenceGate
from registry.metric_gates import PairedCounts, judge_difference

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger(__name__)

MAX_TILES = 120
"""Tiles that a page shows; it says how many there are."""
LESS_IS_BETTER = ("nll", "brier", "ece")


def render_page(first: "ModelVersion", second: "ModelVersion") -> str:
    """Return the page as HTML.

    Raises:
        TrackingError: a run or its predictions cannot be read.
        ModelError: the two were tested on no tile in common.
    """
    pair = (first, second)
    names = [f"{version.name} {version.version}" for version in pair]
    stored = [evidence.read(versions.run_of(version)) for version in pair]
    common = evidence.common_tiles(stored[0], stored[1])
    if common[0].frame.empty:
        raise ModelError(
            f"{names[0]} and {names[1]} were tested on no tile in common, so they cannot be "
            "compared: train one of them with the split of the other"
        )
    answers = [_answers(predictions) for predictions in common]
    counts = _paired_counts(*answers)
    differs = (answers[0]["answer"] != answers[1]["answer"]).to_numpy()
    differing = [frame[differs][:MAX_TILES] for frame in answers]
    return templates.render(
        "registry",
        "compare.html.j2",
        names=names,
        tiles=counts.tiles,
        counts=counts,
        difference=judge_difference(counts, DifferenceGate()).value,
        verdicts=[v.tags.get(versions.VERDICT_TAG, card.NOT_JUDGED) for v in pair],
        metrics=_metric_rows(*(evidence.metrics(predictions) for predictions in common)),
        differing=_differing_tiles(versions.run_of(first), differing, names),
        differing_count=int(differs.sum()),
    )


def _metric_rows(first: Mapping[str, float], second: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the metrics that both have; the better value of each is marked by its CSS class."""
    return [
        {"name": name, "cells": _cells(name, value, second[name])}
        for name, value in first.items()
        if name in second
    ]


def _cells(name: str, first: float, second: float) -> list[dict[str, str]]:
    sign = -1 if name in LESS_IS_BETTER else 1
    classes = ("better", "worse") if sign * first > sign * second else ("worse", "better")
    if first == second:
        classes = ("", "")
    return [
        {"value": f"{value:.4f}", "css": css}
        for value, css in zip((first, second), classes, strict=True)
    ]


def _answers(predictions: evidence.Predictions) -> "pd.DataFrame":
    """Return per tile: sha256, label, path, answer, confidence, and whether it is right."""
    frame = predictions.frame
    columns = [evidence.PROBABILITY_PREFIX + name for name in predictions.classes]
    probabilities = frame[columns].to_numpy()
    answers = frame[["sha256", "label"]].copy()
    answers["path"] = frame["tile"] if "tile" in frame else frame["sha256"]
    answers["answer"] = [predictions.classes[k] for k in probabilities.argmax(axis=1)]
    answers["confidence"] = probabilities.max(axis=1)
    answers["right"] = answers["answer"] == answers["label"]
    return answers


def _paired_counts(first: "pd.DataFrame", second: "pd.DataFrame") -> PairedCounts:
    first_right, second_right = first["right"], second["right"]
    return PairedCounts(
        tiles=len(first),
        only_candidate=int((first_right & ~second_right).sum()),
        only_champion=int((second_right & ~first_right).sum()),
    )


def _differing_tiles(
    run_id: str, answers: Sequence["pd.DataFrame"], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Return what the page shows of each tile, and each version's answer."""
    pictures = _pictures(run_id, list(answers[0]["sha256"])) if len(answers[0]) else {}
    tiles = []
    for rows in zip(*(frame.itertuples() for frame in answers), strict=True):
        tile_answers = [
            {
                "version": name,
                "class_name": row.answer,
                "confidence": f"{row.confidence:.2f}",
                "right": row.right,
            }
            for name, row in zip(names, rows, strict=True)
        ]
        tiles.append(
            {
                "png": pictures.get(str(rows[0].sha256), ""),
                "path": rows[0].path,
                "label": rows[0].label,
                "answers": tile_answers,
            }
        )
    return tiles


def _pictures(run_id: str, tiles: Sequence[str]) -> dict[str, str]:
    """Return PNG files in base64 by the tile's sha256; empty if the data is not on this machine."""
    from eurosat.evaluation.recorded import recorded_fold

    try:
        pack, rows = recorded_fold(run_id, "test")
    except EuroSATError as error:
        log.warning("the page shows no pictures: %s", error)
        return {}
    row_of = {str(pack.table["sha256"].iloc[row]): int(row) for row in rows}
    return {
        sha256: _png_base64(pack.tiles_NHWC[row_of[sha256]], pack.bands)
        for sha256 in tiles
        if sha256 in row_of
    }


def _png_base64(tile_HWC: Any, bands: int) -> str:
    from PIL import Image

    from eurosat.data.bands import rgb_indices

    pixels = tile_HWC if bands == len("RGB") else tile_HWC[..., rgb_indices()]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("registry.compare", "Write an HTML page with two versions side by side.")
    parser.add_argument("versions", nargs=2, metavar="VERSION")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: reports/compared-VERSION-VERSION.html"
    )
    parser.add_argument("--model", default=versions.MODEL, help="registered model")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    first, second = (versions.from_argument(args.model, number) for number in args.versions)
    out = args.out or Path("reports", f"compared-{first.version}-{second.version}.html")
    page = render_page(first, second)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}") from error
    print(f"written to {out}")
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
