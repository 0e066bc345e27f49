"""What an evaluation tells: figures with intervals, confused classes, worst tiles, pictures."""

from pathlib import Path
from typing import Any

import numpy as np

from eurosat.evaluation import metrics
from eurosat.evaluation import plots as pictures
from eurosat.evaluation.calibration import evaluate
from eurosat.evaluation.results import MAX_WORST, EvaluationResult

MAX_CONFUSED_PAIRS = 8


def summarise(judged: EvaluationResult) -> dict[str, Any]:
    """Everything that can be told as values, for JSON."""
    labels, probabilities, classes = judged.labels, judged.probabilities, judged.pack.classes
    limits = metrics.intervals(labels, probabilities, classes)
    counts = metrics.confusion(labels, probabilities.argmax(axis=1), len(classes))
    return {
        "run": judged.run_id,
        "fold": judged.fold,
        "tiles": len(labels),
        "data_fingerprint": judged.pack.fingerprint,
        "figures": {
            name: {"value": value, "low": limits[name][0], "high": limits[name][1]}
            for name, value in metrics.evaluate(labels, probabilities, classes).items()
        },
        "calibration": {"temperature": judged.calibration.temperature}
        | evaluate(judged.calibration, judged.logits, labels),
        "confused": _most_confused_pairs(counts, classes),
        "confusion": counts.tolist(),
        "worst": _worst_tiles(judged),
    }


def _most_confused_pairs(counts: Any, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Pairs of classes by the tiles of either that were taken for the other."""
    both = counts + counts.T
    pairs = [(int(both[i, j]), i, j) for i in range(len(classes)) for j in range(i)]
    return [
        {"classes": [classes[j], classes[i]], "tiles": tiles}
        for tiles, i, j in sorted(pairs, reverse=True)[:MAX_CONFUSED_PAIRS]
        if tiles
    ]


def _worst_tiles(judged: EvaluationResult) -> list[dict[str, Any]]:
    """The tiles of the highest loss."""
    probabilities, classes = judged.probabilities, judged.pack.classes
    loss = metrics.per_tile_nll(judged.labels, probabilities)
    tiles = judged.tiles
    return [
        {
            "tile": tiles[n],
            "expected": classes[int(judged.labels[n])],
            "label": classes[int(probabilities[n].argmax())],
            "confidence": float(probabilities[n].max()),
            "loss": float(loss[n]),
        }
        for n in np.argsort(-loss, kind="stable")[:MAX_WORST]
    ]


def render_markdown(told: dict[str, Any]) -> str:
    """The report as people read it."""
    fold = f"unseen tiles of {told['data']}" if "data" in told else f"{told['fold']} fold"
    lines = [f"# Run {told['run']}, {fold}, {told['tiles']:,} tiles", ""]
    lines += ["| figure | value | 95 % interval |", "|---|---|---|"]
    of_class: dict[str, dict[str, str]] = {}
    for name, one in told["figures"].items():
        text = f"{one['low']:.4f} to {one['high']:.4f}"
        if "/" in name:
            figure, _, label = name.partition("/")
            of_class.setdefault(label, {})[figure] = f"{one['value']:.4f} ({text})"
        else:
            lines.append(f"| {name} | {one['value']:.4f} | {text} |")
    columns = list(next(iter(of_class.values())))
    lines += ["", f"| class | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {label} | {' | '.join(row.values())} |" for label, row in of_class.items()]
    trust = told["calibration"]
    lines += [
        "",
        f"Temperature {trust['temperature']:.3f}. Prediction sets hold the true class of "
        f"{trust['coverage']:.4f} of the tiles ({trust['coverage_worst_class']:.4f} of the worst "
        f"class), with {trust['set_size']:.2f} classes on average; {trust['unlike']:.4f} of the "
        "tiles are told to be unlike the training data.",
        "",
        "| most confused | tiles |",
        "|---|---|",
    ]
    lines += [f"| {' and '.join(one['classes'])} | {one['tiles']} |" for one in told["confused"]]
    if against := told.get("against"):
        lines += ["", *_against(against)]
    if rows := told.get("corruptions"):
        lines += ["", *_corruptions(rows)]
    return "\n".join(lines) + "\n"


def _against(against: dict[str, Any]) -> list[str]:
    lines = [
        f"Against run {against['run']}: {against['only_first']} tiles right here alone, "
        f"{against['only_second']} there alone; exact McNemar p = {against['p_value']:.4g}.",
        "",
        "| difference | value | 95 % interval |",
        "|---|---|---|",
    ]
    for name, value in against["difference"].items():
        low, high = against["interval"][name]
        lines.append(f"| {name} | {value:+.4f} | {low:+.4f} to {high:+.4f} |")
    return lines


def _corruptions(rows: list[dict[str, Any]]) -> list[str]:
    """One line a kind, one column a severity: accuracy / mean confidence / share told unlike."""
    clean = next(row for row in rows if not row["severity"])
    lines = [
        f"Accuracy / mean confidence / share told unlike the training data, on {clean['tiles']} "
        f"tiles; untouched {_cell(clean)}.",
        "",
        "| corruption | 1 | 2 | 3 | 4 | 5 |",
        "|---|---|---|---|---|---|",
    ]
    kinds = dict.fromkeys(row["kind"] for row in rows if row["severity"])
    for kind in kinds:
        cells = [_cell(row) for row in rows if row["kind"] == kind]
        lines.append(f"| {kind.replace('_', ' ')} | {' | '.join(cells)} |")
    return lines


def _cell(row: dict[str, Any]) -> str:
    return f"{row['accuracy']:.3f} / {row['confidence']:.3f} / {row['unlike']:.2f}"


def draw_plots(judged: EvaluationResult, told: dict[str, Any], folder: Path) -> None:
    """confusion.png, confusion-shares.png, reliability.png, worst.png and corruptions.png."""
    classes, counts = judged.pack.classes, np.asarray(told["confusion"])
    title = f"{told['fold']} fold, accuracy {told['figures']['accuracy']['value']:.4f}"
    pictures.confusion_matrix(counts, classes, title, folder / "confusion.png")
    pictures.confusion_matrix(
        counts, classes, title, folder / "confusion-shares.png", normalised=True
    )
    pictures.reliability(judged.labels, judged.probabilities, title, folder / "reliability.png")
    place = dict(zip(judged.tiles, judged.rows, strict=True))
    pictures.captioned_tiles(
        judged.pack.tiles_NHWC[[place[one["tile"]] for one in told["worst"]]],
        [f"{one['tile']}\n{one['label']} {one['confidence']:.2f}" for one in told["worst"]],
        f"{told['fold']} fold: the tiles of the highest loss",
        folder / "worst.png",
    )
    if rows := told.get("corruptions"):
        pictures.corruption_curves(rows, "Under corruptions", folder / "corruptions.png")
