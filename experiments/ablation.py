"""One question asked of a recipe: the same training for each value of a key, in one figure."""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eurosat import tracking, train
from eurosat.config import compose, from_mapping
from eurosat.data.prepare import prepare
from eurosat.errors import ConfigError, NonFiniteLoss
from eurosat.runtime import cli, exit_codes
from experiments import presets

log = logging.getLogger(__name__)

STUDIES = Path(__file__).parent / "studies"

USAGE = """
usage: python -m experiments.ablation NAME [key=value ...]

  NAME of experiments/studies/NAME.yaml, or a YAML file; then what `python -m eurosat.train` takes
"""

Curves = Mapping[str, Sequence[float]]
"""Per value of the key, the figure by epoch; shorter where the training diverged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    question: str
    key: str
    """Dotted key of the recipe."""
    values: list[Any]
    metric: str = "val_macro_f1"
    overrides: list[str]
    """Of the recipe, the same for all values."""


def load(name: str) -> Study:
    """Read ``experiments/studies/NAME.yaml``, or the file that ``name`` names.

    Raises:
        ConfigError: no such study, or one that does not fit.
    """
    values, _ = presets.read("study", STUDIES, name)
    return from_mapping(Study, values, "study")


def ask(study: Study, overrides: Sequence[str], parent: tracking.Run) -> Curves:
    """Train once per value, each a child run; a value that diverges keeps the curve it reached."""
    from eurosat.training import launch

    curves: dict[str, list[float]] = {}
    base = [*study.overrides, *overrides]
    data = prepare(compose(base))
    parent.set_tags(data.tags)
    for value in study.values:
        config = compose([*base, f"{study.key}={value}"])
        curve = curves[str(value)] = []

        def on_epoch(_: int, metrics: Mapping[str, float], curve: list[float] = curve) -> None:
            curve.append(metrics[study.metric])

        label = f"{study.key}={value}"
        try:
            with tracking.run(
                config.experiment, label, parent=parent.journal, tags={"kind": "study"}
            ) as run:
                train.describe(config, data, run)
                fitted = launch.fit(config, data, run, on_epoch)
                curve[:] = [row[study.metric] for row in fitted.history]  # told late by Ray
        except NonFiniteLoss as error:
            log.warning("%s: %s", label, error)
    return curves


def draw(study: Study, curves: Curves, file: Path) -> None:
    """The figure by epoch, one line a value."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (value, curve) in enumerate(curves.items()):
        colour = colormaps["viridis"](number / max(1, len(curves) - 1))
        end = f", best {max(curve):.4f}" if curve else ", diverged at once"
        axes.plot(range(1, len(curve) + 1), curve, marker=".", color=colour, label=f"{value}{end}")
    axes.set(xlabel="epoch", ylabel=study.metric, title=study.question)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(title=study.key, fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def main(argv: Sequence[str]) -> int:
    named = [one for one in argv if "=" not in one and not one.startswith("-")]
    overrides = cli.overrides([one for one in argv if one not in named], USAGE)
    if len(named) != 1:
        raise ConfigError(f"name one study, not {len(named)}: python -m experiments.ablation NAME")
    study = load(named[0])
    config = compose([*study.overrides, *overrides])
    name = Path(named[0]).stem
    with (
        tempfile.TemporaryDirectory() as folder,
        tracking.run(config.experiment, f"study {name}", tags={"kind": "study"}) as parent,
    ):
        parent.log_params({"study": {"key": study.key, "values": study.values}})
        curves = ask(study, overrides, parent)
        draw(study, curves, Path(folder) / f"{name}.png")
        parent.log_folder(Path(folder), "figures")
        parent.log_text(_table(study, curves), "study.csv")
    for value, curve in curves.items():
        print(f"{study.key}={value}\tbest {study.metric} {max(curve, default=float('nan')):.4f}")
    print(f"study {parent.run_id}")
    return exit_codes.OK


def _table(study: Study, curves: Curves) -> str:
    lines = [f"{study.key},epoch,{study.metric}"]
    lines += [f"{k},{n},{v:.6f}" for k, curve in curves.items() for n, v in enumerate(curve, 1)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run_command(main)
