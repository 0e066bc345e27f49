"""Plots as PNG files, drawn without a display and without global state."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from eurosat.data import bands
from eurosat.evaluation.metrics import NUM_BINS, confidence_bin

DPI = 120
TITLE_CHARACTERS_PER_INCH = 11
"""Characters of a title at its font size of 10 points that fit into an inch."""
LINE_STYLES = {"accuracy": "-", "confidence": "--", "out_of_distribution": ":"}
"""Line of each value in `corruption_curves`."""


def set_title(figure: Figure, title: str) -> None:
    """Put a title above the figure, in as many lines as its width needs."""
    width = int(figure.get_figwidth() * TITLE_CHARACTERS_PER_INCH)
    figure.suptitle(textwrap.fill(title, width), fontsize=10)


def confusion_matrix(
    counts: npt.NDArray[np.int64],
    classes: Sequence[str],
    title: str,
    file: Path,
    *,
    normalised: bool = False,
) -> None:
    """Draw a confusion matrix: rows are true classes, colour is the share of the row.

    The text of a cell is its count or, with ``normalised``, its share.
    """
    side = 2.5 + 0.6 * len(classes)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(counts):
        colour = "white" if shares[row, column] > 0.5 else "black"
        text = f"{shares[row, column]:.3f}" if normalised else str(counts[row, column])
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted", ylabel="true")
    set_title(figure, title)
    figure.savefig(file, dpi=DPI)


def reliability(
    labels: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float64], title: str, file: Path
) -> None:
    """Draw accuracy by confidence, with its 95 % error bars, and the number of tiles.

    A calibrated network follows the diagonal.
    """
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = confidence_bin(confidence)
    counts = np.bincount(bins, minlength=NUM_BINS)
    filled = counts > 0
    accuracy = np.bincount(bins, right, minlength=NUM_BINS)[filled] / counts[filled]
    mean_confidence = np.bincount(bins, confidence, minlength=NUM_BINS)[filled] / counts[filled]
    figure = Figure(figsize=(5, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], linestyle=":", color="grey")
    spread = 1.96 * np.sqrt(np.maximum(accuracy * (1 - accuracy), 1e-9) / counts[filled])
    upper.errorbar(mean_confidence, accuracy, spread, marker="o", capsize=2)
    ece = np.abs(mean_confidence - accuracy) @ counts[filled] / len(labels)
    upper.set(ylabel="accuracy", ylim=(0, 1.02))
    lower.bar((np.arange(NUM_BINS) + 0.5) / NUM_BINS, counts, width=0.9 / NUM_BINS)
    lower.set(xlabel="confidence", ylabel="tiles", yscale="log", xlim=(0, 1))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    set_title(figure, f"{title}, calibration error {ece:.4f}")
    figure.savefig(file, dpi=DPI)


def corruption_curves(rows: Sequence[Mapping[str, Any]], title: str, file: Path) -> None:
    """Draw accuracy, confidence and share out of distribution by severity, a panel per kind."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows if row["severity"]))
    clean = next(row for row in rows if not row["severity"])
    columns = 4
    lines = math.ceil(len(kinds) / columns)
    figure = Figure(figsize=(2.8 * columns, 2.4 * lines), layout="constrained")
    flat = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes in flat[len(kinds) :]:
        axes.set_axis_off()
    for axes, kind in zip(flat, kinds, strict=False):
        kind_rows = [clean, *(row for row in rows if row["kind"] == kind)]
        severity = [row["severity"] for row in kind_rows]
        for name, style in LINE_STYLES.items():
            label = name.replace("_", " ")
            axes.plot(severity, [row[name] for row in kind_rows], style, marker=".", label=label)
        axes.set_title(kind.replace("_", " "), fontsize=9)
        axes.grid(alpha=0.3)
        axes.set_ylim(0, 1.02)
    flat[0].legend(fontsize=7)
    figure.supxlabel("severity")
    set_title(figure, title)
    figure.savefig(file, dpi=DPI)


def training_curves(history: Sequence[Mapping[str, float]], title: str, file: Path) -> None:
    """Draw loss and validation accuracy by epoch."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = range(1, len(history) + 1)
    for name in ("train_loss", "val_loss"):
        left.plot(epochs, [row.get(name, np.nan) for row in history], label=name, marker=".")
    accuracy = [row["val_accuracy"] for row in history]
    right.plot(epochs, accuracy, label="val_accuracy", marker=".", color="tab:green")
    best = int(np.argmax(accuracy))
    right.axhline(accuracy[best], linestyle=":", color="grey")
    right.set_title(f"best {accuracy[best]:.4f} at epoch {best + 1}", fontsize=9)
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    set_title(figure, title)
    figure.savefig(file, dpi=DPI)


def class_counts(counts: Mapping[str, Mapping[str, int]], title: str, file: Path) -> None:
    """Draw the number of tiles per class and fold as stacked bars."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    classes = list(counts)
    bottom = np.zeros(len(classes))
    for fold in next(iter(counts.values())):
        heights = np.array([counts[name][fold] for name in classes])
        axes.bar(classes, heights, bottom=bottom, label=fold)
        bottom += heights
    axes.bar_label(axes.containers[-1], [f"{int(total):,}" for total in bottom], fontsize=8)  # type: ignore[arg-type]
    axes.tick_params(axis="x", rotation=35)
    axes.set(ylabel="tiles")
    axes.legend()
    set_title(figure, title)
    figure.savefig(file, dpi=DPI)


def contact_sheet(rows: Mapping[str, npt.NDArray[np.uint8]], title: str, file: Path) -> None:
    """Draw a row of (n, H, W, C) tiles under each name."""
    columns = max(len(tiles) for tiles in rows.values())
    figure = Figure(figsize=(1.0 * columns + 1.6, 1.0 * len(rows) + 0.5), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, tiles) in zip(grid, rows.items(), strict=True):
        for axes in line:
            axes.set_axis_off()
        for axes, tile in zip(line, tiles, strict=False):
            axes.imshow(visible(tile), cmap="gray")
        line[0].set_title(name, fontsize=8, loc="left")
    set_title(figure, title)
    figure.savefig(file, dpi=DPI)


def visible(tile: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return the (H, W, 3) RGB bands of an (H, W, C) tile, or (H, W) of its first band.

    RGB are the red, green and blue bands of Sentinel-2's thirteen, or else the first three bands;
    a tile of one or two bands has no colours.
    """
    if tile.shape[-1] == len(bands.NAMES):
        return tile[..., bands.rgb_indices()]
    return tile[..., :3] if tile.shape[-1] >= 3 else tile[..., 0]


def captioned_tiles(
    tiles_NHWC: npt.NDArray[np.uint8], captions: Sequence[str], title: str, file: Path
) -> None:
    """Draw tiles in rows of five, each under its caption."""
    columns = 5
    lines = math.ceil(len(captions) / columns)
    figure = Figure(figsize=(2.6 * columns, 2.9 * lines + 0.4), layout="constrained")
    flat = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in flat:
        axes.set_axis_off()
    for axes, tile, caption in zip(flat, tiles_NHWC, captions, strict=False):
        axes.imshow(visible(tile), cmap="gray")
        axes.set_title(caption, fontsize=7)
    set_title(figure, title)
    figure.savefig(file, dpi=DPI)


def band_histograms(
    histograms: Mapping[str, npt.NDArray[np.float64]],
    means: Mapping[str, npt.NDArray[np.float64]],
    title: str,
    file: Path,
) -> None:
    """Draw (C, 64) shares of pixels by grey level per class, and the mean colour as a patch."""
    columns = 5
    lines = math.ceil(len(histograms) / columns)
    figure = Figure(figsize=(3 * columns, 2.2 * lines), layout="constrained")
    flat = figure.subplots(lines, columns, squeeze=False, sharex=True).ravel()
    for axes in flat[len(histograms) :]:
        axes.set_axis_off()
    for axes, (name, shares) in zip(flat, histograms.items(), strict=False):
        num_bands = len(shares)
        colours = ["tab:red", "tab:green", "tab:blue"] if num_bands == 3 else [None] * num_bands
        levels = (np.arange(shares.shape[1]) + 0.5) * 256 / shares.shape[1]
        for number, (line, colour) in enumerate(zip(shares, colours, strict=True)):
            axes.plot(levels, line, color=colour, label=f"band {number + 1}", linewidth=1)
        red, green, blue = (means[name][:3] if num_bands >= 3 else means[name][[0, 0, 0]]) / 255
        patch = Rectangle((0.86, 0.78), 0.12, 0.2, transform=axes.transAxes)
        patch.set_facecolor((red, green, blue))
        axes.add_patch(patch)
        axes.set_title(name, fontsize=9)
        axes.set_yticks([])
    flat[0].legend(fontsize=7)
    set_title(figure, title)
    figure.savefig(file, dpi=DPI)
