"""The report of an evaluation: metrics with intervals, confused classes, worst tiles, plots."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eurosat.evaluation import metrics, plots
from eurosat.evaluation.calibration import evaluate
from eurosat.evaluation.results import MAX_WORST, EvaluationResult
from eurosat.runtime import templates

MAX_CONFUSED_PAIRS = 8


def summarise(result: EvaluationResult) -> dict[str, Any]:
    """Return all values of the report, ready for JSON."""
    labels, probabilities, classes = result.labels, result.probabilities, result.pack.classes
    intervals = metrics.intervals(labels, probabilities, classes)
    counts = metrics.confusion(labels, probabilities.argmax(axis=1), len(classes))
    return {
        "run": result.run_id,
        "fold": result.fold,
        "tiles": len(labels),
        "data_fingerprint": result.pack.fingerprint,
        "metrics": {
            name: {"value": value, "low": intervals[name][0], "high": intervals[name][1]}
            for name, value in metrics.evaluate(labels, probabilities, classes).items()
        },
        "calibration": {"temperature": result.calibration.temperature}
        | evaluate(result.calibration, result.logits, labels),
        "confused": _most_confused_pairs(counts, classes),
        "confusion": counts.tolist(),
        "worst": _worst_tiles(result),
    }


def _most_confused_pairs(
    counts: npt.NDArray[np.int64], classes: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Return pairs of classes, most confused first, with the tiles confused either way."""
    both = counts + counts.T
    pairs = [(int(both[i, j]), i, j) for i in range(len(classes)) for j in range(i)]
    return [
        {"classes": [classes[j], classes[i]], "tiles": tiles}
        for tiles, i, j in sorted(pairs, reverse=True)[:MAX_CONFUSED_PAIRS]
        if tiles
    ]


def _worst_tiles(result: EvaluationResult) -> list[dict[str, Any]]:
    """Return the tiles with the highest loss, worst first."""
    probabilities, classes = result.probabilities, result.pack.classes
    loss = metrics.per_tile_nll(result.labels, probabilities)
    tiles = result.tiles
    return [
        {
            "tile": tiles[n],
            "expected": classes[int(result.labels[n])],
            "label": classes[int(probabilities[n].argmax())],
            "confidence": float(probabilities[n].max()),
            "loss": float(loss[n]),
        }
        for n in np.argsort(-loss, kind="stable")[:MAX_WORST]
    ]


def render_markdown(summary: Mapping[str, Any]) -> str:
    """Return the report as Markdown; `summarise` says what the summary contains."""
    overall: dict[str, Any] = {}
    per_class: dict[str, dict[str, Any]] = {}
    for name, metric in summary["metrics"].items():
        metric_name, _, label = name.partition("/")
        if label:
            per_class.setdefault(label, {})[metric_name] = metric
        else:
            overall[name] = metric
    rows = summary.get("corruptions", [])
    corrupted: dict[str, list[Any]] = {}
    for row in rows:
        if row["severity"]:
            corrupted.setdefault(row["kind"], []).append(row)
    return templates.render(
        "eurosat.evaluation",
        "report.md.j2",
        **{"against": None, **summary},
        tile_set=_tile_set(summary),
        overall=overall,
        per_class=per_class,
        class_metrics=list(next(iter(per_class.values()))),
        clean=next((row for row in rows if not row["severity"]), None),
        corrupted=corrupted,
    )


def _tile_set(summary: Mapping[str, Any]) -> str:
    """Return which tiles were evaluated, in words."""
    if "data" in summary:
        return f"unseen tiles of {summary['data']}"
    return f"{summary['fold']} fold"


def draw_plots(result: EvaluationResult, summary: Mapping[str, Any], folder: Path) -> None:
    """Write confusion, confusion-shares, reliability, worst and corruptions as PNG files."""
    classes, counts = result.pack.classes, np.asarray(summary["confusion"])
    accuracy = summary["metrics"]["accuracy"]["value"]
    title = f"{_tile_set(summary)}, accuracy {accuracy:.4f}"
    plots.confusion_matrix(counts, classes, title, folder / "confusion.png")
    plots.confusion_matrix(counts, classes, title, folder / "confusion-shares.png", normalised=True)
    plots.reliability(result.labels, result.probabilities, title, folder / "reliability.png")
    row_of = dict(zip(result.tiles, result.rows, strict=True))
    worst = summary["worst"]
    plots.captioned_tiles(
        result.pack.tiles_NHWC[[row_of[tile["tile"]] for tile in worst]],
        [f"{tile['tile']}\n{tile['label']} {tile['confidence']:.2f}" for tile in worst],
        f"{_tile_set(summary)}: the tiles with the highest loss",
        folder / "worst.png",
    )
    if rows := summary.get("corruptions"):
        plots.corruption_curves(rows, "Corrupted tiles", folder / "corruptions.png")
