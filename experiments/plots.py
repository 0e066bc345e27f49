"""Figures of a study."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)


def draw_study(study: "optuna.Study", folder: Path) -> None:
    """Write history, importances and parallel coordinates as PNG files.

    Importances and coordinates need two finished trials that differ; without, the log says so.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from optuna.visualization import matplotlib as draw

    figures: dict[str, Callable[..., Any]] = {
        "history": draw.plot_optimization_history,
        "importances": draw.plot_param_importances,
        "parallel_coordinates": draw.plot_parallel_coordinate,
    }
    finished = {trial.value for trial in study.trials if trial.value is not None}
    for name, plot in figures.items():
        if name != "history" and len(finished) < 2:
            log.info("no figure of %s: it needs two finished trials of different accuracy", name)
            continue
        with mpl.rc_context(), warnings.catch_warnings():  # optuna sets a style for everyone
            warnings.simplefilter("ignore")  # optuna calls its matplotlib figures experimental
            plot(study)
            figure = plt.gcf()
            figure.set_size_inches(9, 5)
            figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
            plt.close("all")
