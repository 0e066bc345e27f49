"""An ablation: the same training for each value of one key, compared in one plot."""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eurosat import tracking, train
from eurosat.config import compose
from eurosat.data.prepare import prepare
from eurosat.errors import ConfigError, NonFiniteLoss
from eurosat.runtime import cli, exit_codes
from eurosat.runtime.settings import from_mapping, settings
from experiments import presets

log = logging.getLogger(__name__)

ABLATIONS = Path(__file__).parent / "ablations"

USAGE = """
usage: python -m experiments.ablation NAME [key=value ...]

  NAME       experiments/ablations/NAME.yaml, or the path of a YAML file
  key=value  anything that `python -m eurosat.train` takes, the same for all values
"""

Curves = Mapping[str, Sequence[float]]
"""The metric by epoch for each value of the key; shorter where the training diverged."""


@settings("ablation")
class Ablation:
    question: str
    """Title of the plot."""
    key: str
    """Dotted key of the recipe."""
    values: list[Any]
    metric: str = "val_macro_f1"
    overrides: list[str]
    """Overrides of the recipe, the same for all values."""


def load(name: str) -> Ablation:
    """Read ``experiments/ablations/NAME.yaml``, or the YAML file at path ``name``.

    Raises:
        ConfigError: there is no such ablation, or its keys are wrong.
    """
    values, _ = presets.read("ablation", ABLATIONS, name)
    return from_mapping(Ablation, values, "ablation")


def train_values(ablation: Ablation, overrides: Sequence[str], parent: tracking.Run) -> Curves:
    """Train once per value, each in a child run; one that diverges keeps its curve so far."""
    from eurosat.training import launch

    curves: dict[str, list[float]] = {}
    base = [*ablation.overrides, *overrides]
    data = prepare(compose(base))
    parent.set_tags(data.tags)
    for value in ablation.values:
        config = compose([*base, f"{ablation.key}={value}"])
        curve = curves[str(value)] = []

        def on_epoch(_: int, metrics: Mapping[str, float], curve: list[float] = curve) -> None:
            curve.append(metrics[ablation.metric])

        label = f"{ablation.key}={value}"
        try:
            with tracking.run(
                config.experiment, label, parent=parent.journal, tags={"kind": "study"}
            ) as run:
                train.describe(config, data, run)
                fitted = launch.fit(config, data, run, on_epoch)
                # Ray reports epochs late, the history is complete
                curve[:] = [row[ablation.metric] for row in fitted.history]
        except NonFiniteLoss as error:
            log.warning("%s: %s", label, error)
    return curves


def plot_curves(ablation: Ablation, curves: Curves, file: Path) -> None:
    """Plot the metric by epoch, one line per value."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (value, curve) in enumerate(curves.items()):
        colour = colormaps["viridis"](number / max(1, len(curves) - 1))
        end = f", best {max(curve):.4f}" if curve else ", diverged at once"
        axes.plot(range(1, len(curve) + 1), curve, marker=".", color=colour, label=f"{value}{end}")
    axes.set(xlabel="epoch", ylabel=ablation.metric, title=ablation.question)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(title=ablation.key, fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def main(argv: Sequence[str]) -> int:
    names = [argument for argument in argv if "=" not in argument and not argument.startswith("-")]
    overrides = cli.overrides([argument for argument in argv if argument not in names], USAGE)
    if len(names) != 1:
        raise ConfigError(
            f"name one ablation, not {len(names)}: python -m experiments.ablation NAME"
        )
    ablation = load(names[0])
    config = compose([*ablation.overrides, *overrides])
    name = Path(names[0]).stem
    with (
        tempfile.TemporaryDirectory() as folder,
        tracking.run(config.experiment, f"study {name}", tags={"kind": "study"}) as parent,
    ):
        parent.log_params({"study": {"key": ablation.key, "values": ablation.values}})
        curves = train_values(ablation, overrides, parent)
        plot_curves(ablation, curves, Path(folder) / f"{name}.png")
        parent.log_folder(Path(folder), "figures")
        parent.log_text(_curves_csv(ablation, curves), "study.csv")
    for value, curve in curves.items():
        best = max(curve, default=float("nan"))
        print(f"{ablation.key}={value}\tbest {ablation.metric} {best:.4f}")
    print(parent.summary("ablation"))
    return exit_codes.OK


def _curves_csv(ablation: Ablation, curves: Curves) -> str:
    lines = [f"{ablation.key},epoch,{ablation.metric}"]
    for value, curve in curves.items():
        lines += [f"{value},{epoch},{metric:.6f}" for epoch, metric in enumerate(curve, 1)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run_command(main)
