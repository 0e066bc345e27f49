"""The model card: what a version is for, from what it was made, and how well it does."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eurosat import tracking
from eurosat.runtime import cli, exit_codes, logs
from registry import evidence, robustness, versions

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

FILE = "card.md"
"""Of the run's artifacts; the version's description is its beginning."""
MOST_DESCRIPTION = 4900
"""Characters: MLflow's own stores take 5,000."""
PURPOSE = (
    "Land cover of one satellite tile, for maps of an area and of its change. It answers one class "
    "for the whole tile. It is not for single pixels, nor for other sensors than it was trained "
    "on, nor for decisions about a single place that nobody looks at."
)
RESAMPLES = 200
SHOWN = ("accuracy", "macro_f1", "macro_auprc", "nll", "ece")
OF_CLASS = ("precision", "recall", "f1", "auprc")
DATA_LICENCES = {
    "eurosat": "EuroSAT (Helber et al. 2019): MIT; contains modified Copernicus Sentinel data",
    "synthetic": "made by `eurosat.data.synthetic`: no licence is needed",
}
WEIGHT_LICENCES = {
    "none": "trained from scratch",
    "efficientnet-lite": "EfficientNet-Lite0 with ImageNet weights: Apache-2.0",
    "imagenet": "timm's hub: see the card of the model there",
}
ASK = "ask whoever they are from"


def write(model: str, number: str) -> None:
    """Put the card beside the run, and its beginning into the version's description.

    Raises:
        TrackingError: the version, its run or one of its artifacts cannot be read.
    """
    from mlflow.exceptions import MlflowException

    version = versions.get(model, number)
    run = tracking.get(versions.run_of(version))
    sections = told(version, run)
    text = "\n\n".join(sections) + "\n"
    head = "\n\n".join(sections[:4])
    with (
        tempfile.TemporaryDirectory() as folder,
        tracking.translate_errors(f"card of version {number}"),
    ):
        file = Path(folder) / FILE
        file.write_text(text)
        client = versions.client()
        client.log_artifact(run.run_id, str(file))
        try:
            client.update_model_version(model, number, head[:MOST_DESCRIPTION])
        except MlflowException as error:
            if error.error_code != versions.DENIED:  # the promoter writes it with its verdict
                raise


def told(version: "ModelVersion", run: tracking.RunRecord) -> list[str]:
    """The sections, in Markdown; those that a hurried reader needs come first."""
    predictions = evidence.read(run.run_id)
    figures = evidence.figures(predictions)
    return [
        f"# {version.name} version {version.version}",
        PURPOSE,
        _headline(predictions, figures),
        f"**Verdict**: {version.tags.get(versions.VERDICT, 'not judged yet')}",
        "## Data\n" + _listed(_data(run)),
        "## Recipe\n" + _listed(_recipe(run)),
        "## Figures\n" + _figures(predictions, figures),
        "## Classes\n" + _classes(predictions, figures),
        "## Confusion\nRows are the true classes.\n\n" + _confusion(predictions),
        "## Calibration\n" + _listed(_calibration(run)),
        "## Under corruptions\n" + _corruptions(run),
        "## Served forms\n" + _listed(_forms(version, run)),
        "## Not known\n"
        + _listed(
            {
                "stronger corruptions": "`python -m eurosat.evaluate models:/"
                f"{version.name}/{version.version} --corruptions` measures five degrees",
                "latency": "of the machine that serves: `python -m registry.judge "
                f"{version.version} --latency` there",
            }
        ),
    ]


def _headline(predictions: evidence.Predictions, figures: Mapping[str, float]) -> str:
    if not figures:
        return "Its probabilities are not numbers in [0, 1]: it has no figures."
    worst = min((v, k) for k, v in figures.items() if k.startswith(evidence.RECALL))
    return (
        f"**{figures['accuracy']:.4f}** of {len(predictions.frame):,} test tiles are right, and of "
        f"the class that fares worst, {worst[1].removeprefix(evidence.RECALL)}, {worst[0]:.4f}."
    )


def _data(run: tracking.RunRecord) -> dict[str, str]:
    import pandas as pd

    with tracking.artifact(run.run_id, evidence.SPLIT) as file:
        folds = pd.read_csv(file, dtype=str)["fold"].value_counts()
    source = run.params.get("data.source", "unknown")
    return {
        "source": source,
        "licence": DATA_LICENCES.get(source, ASK),
        "folds": ", ".join(f"{name} {count:,}" for name, count in folds.items()),
        "protocol": f"{run.params.get('data.protocol', 'unknown')}, seed "
        f"{run.params.get('data.split_seed', 'unknown')}",
        **{
            name: run.tags.get(name, "unknown")
            for name in ("data.fingerprint", "split.fingerprint", "data.validation")
        },
    }


def _recipe(run: tracking.RunRecord) -> dict[str, str]:
    weights = run.params.get("weights", "unknown")
    names = ("recipe", "model.name", "model.tta_views", "trainer.epochs", "distill.teacher", "seed")
    return {
        **{name: run.params[name] for name in names if name in run.params},
        "first weights": f"{weights} ({WEIGHT_LICENCES.get(weights, ASK)})",
        "run": run.run_id,
        "code": run.tags.get("code.commit", "unknown"),
        "settings": run.tags.get("config.digest", "unknown"),
        "trained on": run.tags.get("compute.hardware", "unknown"),
    }


def _figures(predictions: evidence.Predictions, figures: Mapping[str, float]) -> str:
    limits = evidence.intervals(predictions, RESAMPLES)
    rows = [
        (name, f"{figures[name]:.4f}", "{:.4f} to {:.4f}".format(*limits[name]))
        for name in SHOWN
        if name in figures
    ]
    return _table(("test fold", "value", f"95 % bootstrap interval ({RESAMPLES} draws)"), rows)


def _classes(predictions: evidence.Predictions, figures: Mapping[str, float]) -> str:
    counts = predictions.frame["label"].value_counts()
    rows = [
        (
            name,
            f"{counts.get(name, 0):,}",
            *(f"{figures.get(f'{figure}/{name}', float('nan')):.4f}" for figure in OF_CLASS),
        )
        for name in predictions.classes
    ]
    return _table(("class", "tiles", *OF_CLASS), rows)


def _confusion(predictions: evidence.Predictions) -> str:
    import pandas as pd

    columns = [evidence.PREFIX + name for name in predictions.classes]
    guessed = predictions.frame[columns].to_numpy().argmax(axis=1)
    counts = pd.crosstab(
        predictions.frame["label"].to_numpy(), [predictions.classes[k] for k in guessed]
    ).reindex(index=predictions.classes, columns=predictions.classes, fill_value=0)
    rows = [(name, *(f"{n:,}" for n in counts.loc[name])) for name in predictions.classes]
    return _table(("", *predictions.classes), rows)


def _calibration(run: tracking.RunRecord) -> dict[str, str]:
    names = {
        "test_ece": "calibration error",
        "test_uncalibrated_ece": "before calibration",
        "test_coverage": "tiles whose prediction set holds the truth",
        "test_set_size": "classes in a set",
        "test_one_view_accuracy": "accuracy in one view",
    }
    return {said: f"{run.metrics[name]:.4f}" for name, said in names.items() if name in run.metrics}


def _corruptions(run: tracking.RunRecord) -> str:
    asked = robustness.read(run.run_id)
    if asked.predictions is None:
        return f"Not known: {asked.fault}; {robustness.remedy(run.run_id)}."
    tiles = asked.predictions.frame["sha256"].nunique()
    rows = [
        (kind.replace("_", " "), f"{accuracy:.4f}", f"{confidence:.4f}")
        for kind, accuracy, confidence in robustness.by_kind(asked.predictions)
    ]
    return f"{tiles:,} test tiles in one view, severity {robustness.SEVERITY} of 5.\n\n" + _table(
        ("kind", "accuracy", "mean confidence"), rows
    )


def _forms(version: "ModelVersion", run: tracking.RunRecord) -> dict[str, str]:
    sizes = {
        Path(name).name: f"{size / 1e6:.1f} MB"
        for name, (_, size) in versions.files_of(version).items()
        if name.endswith(".onnx")
    }
    names = {
        "onnx_difference": "largest difference of a probability from the trained network",
        "int8_accuracy": "accuracy in whole numbers",
    }
    return sizes | {
        said: f"{run.metrics[name]:.4g}" for name, said in names.items() if name in run.metrics
    }


def _listed(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items()) or "- nothing"


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("registry.card", "Write a version's model card anew, and print it.")
    parser.add_argument("version", metavar="VERSION")
    parser.add_argument("--model", default=versions.MODEL, help="registered model")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    version = versions.named(args.model, args.version)
    write(args.model, str(version.version))
    with tracking.artifact(versions.run_of(version), FILE) as file:
        print(file.read_text())
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
