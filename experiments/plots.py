"""Plots of a study."""

import logging
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)


def draw_study(study: "optuna.Study", folder: Path) -> None:
    """Write history, importances and parallel coordinates of the accuracy as PNG files.

    A study of two objectives gets its Pareto front as well. Importances and parallel coordinates
    need two finished trials of different accuracy; without them they are left out, and the log
    says so.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from optuna.visualization import matplotlib as draw

    of_accuracy: dict[str, Any] = {
        "target": lambda trial: trial.values[0],
        "target_name": "validation accuracy",
    }
    plots: dict[str, Callable[..., Any]] = {
        "history": partial(draw.plot_optimization_history, **of_accuracy),
        "importances": partial(draw.plot_param_importances, **of_accuracy),
        "parallel_coordinates": partial(draw.plot_parallel_coordinate, **of_accuracy),
    }
    if len(study.directions) == 2:
        names = ["validation accuracy", "latency, ms per tile"]
        plots["pareto_front"] = partial(draw.plot_pareto_front, target_names=names)
    accuracies = {trial.values[0] for trial in study.trials if trial.values}
    for name, plot in plots.items():
        if name in ("importances", "parallel_coordinates") and len(accuracies) < 2:
            log.info("no plot of %s: it needs two finished trials of different accuracy", name)
            continue
        with mpl.rc_context(), warnings.catch_warnings():  # optuna changes the global style
            warnings.simplefilter("ignore")  # optuna calls its matplotlib plots experimental
            plot(study)
            figure = plt.gcf()
            figure.set_size_inches(9, 5)
            figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
            plt.close("all")
