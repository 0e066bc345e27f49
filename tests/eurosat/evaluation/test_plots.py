"""Plots show their titles in full."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eurosat.evaluation import plots


@pytest.mark.parametrize("num_classes", [2, 10])
def test_the_title_of_a_confusion_matrix_lies_inside_the_figure(
    num_classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    classes = [f"class {n}" for n in range(num_classes)]
    title = "resnet18-distilled-from-a-large-teacher, test fold: accuracy 0.9583"
    plots.confusion_matrix(np.eye(num_classes, dtype=np.int64), classes, title, Path("unused"))
    [figure] = figures
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    [text] = [
        text for text in figure.texts if "accuracy 0.9583" in " ".join(text.get_text().split())
    ]
    extent = text.get_window_extent(canvas.get_renderer())
    width, height = canvas.get_width_height()
    assert extent.x0 >= 0
    assert extent.x1 <= width
    assert extent.y1 <= height
