"""Wrap a finished training run as a version of the registered model."""

import io
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eurosat import tracking
from eurosat.errors import ConfigError, ModelError, TrackingError
from eurosat.models.version_files import FILES_TAG
from eurosat.runtime import cli, exit_codes, logs
from eurosat.runtime.digests import sha256_of
from registry import card, evidence, outcome, robustness, versions
from registry.actor import actor
from registry.versions import NETWORK, NETWORK_INT8

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
PYFUNC = ROOT / "serving" / "pyfunc.py"
LOCK = ROOT / "requirements.lock"
PYFUNC_REQUIREMENTS = ("mlflow", "numpy", "onnxruntime", "pandas", "pillow", "simplejpeg")
"""Packages that ``serving/pyfunc.py`` imports; pinned in the model as in the lock."""
BAND_REQUIREMENTS = ("rasterio",)
"""Packages that it also imports for tiles with other bands than red, green and blue."""
FOLDER = "model"
"""Folder of the wrapped model among the run's artifacts."""
MODEL_CONFIG = {"precision": "auto", "threads": 0, "max_batch": 16, "max_wait_ms": 2.0}
"""Settings of ``serving/pyfunc.py``; whoever loads a model may change those that it has."""
REQUIRED_ARTIFACTS = (NETWORK, evidence.PREDICTIONS, "config.yaml", "split.csv")
LINEAGE_TAGS = ("data.fingerprint", "split.fingerprint", "code.commit", "config.digest")
VALIDATION_TAG = "data.validation"
GREY = 128
"""Pixel value of the input example: the middle of the range."""
MAX_ERROR = 200
"""Characters of ONNX Runtime's message that an error of ours repeats."""


def register(reference: str, model: str, alias: str) -> str:
    """Return the number of the version that wraps the run; create it unless it exists.

    Also stores predictions for corrupted tiles, unless the run has them or the tiles are not on
    this machine.

    Raises:
        ConfigError: the alias is one that only `registry.promote` sets.
        TrackingError: no such run, it is not finished, or it lacks an artifact or a tag.
        ModelError: its network or its predictions do not have the form that training writes.
    """
    if alias in (versions.CHAMPION, versions.PREVIOUS):
        raise ConfigError(
            f"only `python -m registry.promote` sets the alias {alias}, after the gates have "
            "passed: choose another --alias, or none"
        )
    run = tracking.get(tracking.resolve_run(reference))
    existing = [v for v in versions.all_of(model) if v.run_id == run.run_id]
    if existing:
        number = str(existing[-1].version)
        log.info("%s version %s already wraps run %s", model, number, run.run_id)
        predicted = robustness.ensure_predicted(run.run_id)
    else:
        _check(run)
        predicted = robustness.ensure_predicted(run.run_id)  # before a webhook starts the judgement
        number = _create(run, model)
        log.info("run %s is %s version %s", run.run_id, model, number)
    champion = versions.by_alias(model, versions.CHAMPION)
    if champion is None or str(champion.version) != number:
        _set_alias(alias, model, number)
    if predicted or not existing:
        card.write(model, number)
    return number


def _set_alias(alias: str, model: str, number: str) -> None:
    """Set the alias, unless a webhook led to a verdict meanwhile, or the user may not."""
    from mlflow.exceptions import MlflowException

    with tracking.translate_errors(f"alias {alias}"):
        if versions.VERDICT_TAG in versions.get(model, number).tags:
            return
        try:
            versions.client().set_registered_model_alias(model, alias, number)
        except MlflowException as error:
            if error.error_code != versions.PERMISSION_DENIED or alias != versions.CHALLENGER:
                raise
            log.info("the promoter judges version %s and sets the alias %s", number, alias)


def pinned_requirements(names: Sequence[str] = PYFUNC_REQUIREMENTS, lock: Path = LOCK) -> list[str]:
    """Return ``name==version`` for this Python and platform, as in the lock.

    Raises:
        ConfigError: the lock cannot be read or lacks a name.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        lines = lock.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"{lock} cannot be read: {error.strerror}") from error
    locked = {}
    for line in lines:
        if not line or line[0] in " #-":
            continue
        try:
            requirement = Requirement(line.rstrip(" \\"))
        except InvalidRequirement as error:
            raise ConfigError(f"{lock} has a line that is not a requirement: {line}") from error
        if requirement.marker is None or requirement.marker.evaluate():
            locked[requirement.name] = f"{requirement.name}{requirement.specifier}"
    missing = [name for name in names if name not in locked]
    if missing:
        raise ConfigError(f"{lock} does not pin {', '.join(missing)}: run `make lock`")
    return [locked[name] for name in names]


def describe_network(network: Path) -> dict[str, Any]:
    """Return classes, tile size, bands and views from the network's metadata.

    Raises:
        ModelError: not ONNX, or without what ``eurosat.models.export`` writes.
    """
    from eurosat.models import onnx_session

    try:
        session = onnx_session.open_session(network)
    except Exception as error:  # onnxruntime's errors have no other common base class
        reason = str(error).splitlines()[0][:MAX_ERROR]
        raise ModelError(
            f"ONNX Runtime cannot open {NETWORK}: {reason}; export it again"
        ) from error
    interface = [(node.name, node.type) for node in (*session.get_inputs(), *session.get_outputs())]
    expected = [("tiles_NHWC", "tensor(uint8)"), ("probabilities", "tensor(float)")]
    if interface[: len(expected)] != expected:
        raise ModelError(
            f"{NETWORK} has the inputs and outputs {interface}, not {expected}: export it again"
        )
    properties = session.get_modelmeta().custom_metadata_map
    try:
        metadata = {key: json.loads(properties[key]) for key in ("classes", "tile_size", "bands")}
        return metadata | {"views": json.loads(properties.get("views", "1"))}
    except (KeyError, ValueError) as error:
        raise ModelError(
            f"{NETWORK} has no readable metadata property {error}: export it again"
        ) from error


def _check(run: tracking.RunRecord) -> None:
    """Raise TrackingError if the run is not a finished training run with all that is needed."""
    if run.status != "FINISHED":
        raise TrackingError(
            f"run {run.run_id} is {run.status}: only a FINISHED training run can be registered"
        )
    names = versions.artifact_names(run.run_id)
    missing = [name for name in REQUIRED_ARTIFACTS if name not in names]
    missing += [
        f"the tag {name}" for name in (*LINEAGE_TAGS, VALIDATION_TAG) if name not in run.tags
    ]
    if missing:
        raise TrackingError(
            f"run {run.run_id} lacks {', '.join(missing)}: name a run of `python -m eurosat.train` "
            "or of a sweep"
        )


def _create(run: tracking.RunRecord, model: str) -> str:
    """Wrap the run's networks, and return the number of the new version."""
    artifacts = {"network": NETWORK}
    if NETWORK_INT8 in versions.artifact_names(run.run_id):
        artifacts["network_int8"] = NETWORK_INT8
    with ExitStack() as stack:
        networks = {
            key: stack.enter_context(tracking.artifact(run.run_id, name))
            for key, name in artifacts.items()
        }
        description = describe_network(networks["network"])
        _check_classes(run.run_id, description["classes"])
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / FOLDER
        _save_pyfunc(networks, description, lineage(run, description), folder)
        return _create_version(run, model, folder)


def _check_classes(run_id: str, classes: Sequence[str]) -> None:
    tested = evidence.read(run_id).classes
    if tested != classes:
        raise ModelError(
            f"{NETWORK} knows the classes {', '.join(classes)} but {evidence.PREDICTIONS} has "
            f"{', '.join(tested)}: train again"
        )


def _create_version(run: tracking.RunRecord, model: str, folder: Path) -> str:
    tags = {name: run.tags[name] for name in (*LINEAGE_TAGS, VALIDATION_TAG)}
    tags[versions.REGISTERED_BY_TAG] = actor()
    tags[FILES_TAG] = json.dumps(hash_files(folder))
    versions.ensure_model(model, "Land cover of satellite tiles")
    with tracking.translate_errors(f"run {run.run_id}"):
        client = versions.client()
        client.log_artifacts(run.run_id, str(folder), FOLDER)
        source = f"{client.get_run(run.run_id).info.artifact_uri}/{FOLDER}"
        return str(client.create_model_version(model, source, run.run_id, tags=tags).version)


def hash_files(folder: Path) -> dict[str, tuple[str, int]]:
    """Return the sha256 and size in bytes of each file in the folder, by its relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): (sha256_of(path), path.stat().st_size)
        for path in files
    }


def lineage(run: tracking.RunRecord, description: Mapping[str, Any]) -> dict[str, Any]:
    """Return where the model comes from; stored beside the network as lineage.json."""
    return {
        "run_id": run.run_id,
        **{name.replace(".", "_"): run.tags[name] for name in (*LINEAGE_TAGS, VALIDATION_TAG)},
        **description,
        "metrics": {k: v for k, v in sorted(run.metrics.items()) if k.startswith("test_")},
    }


def _save_pyfunc(
    networks: Mapping[str, Path],
    description: Mapping[str, Any],
    origin: Mapping[str, Any],
    folder: Path,
) -> None:
    """Write the MLflow model: code by path, no pickle.

    Its lineage has the digests of the networks and the probabilities of the input example, so that
    loading can test itself.
    """
    import mlflow.pyfunc
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    from eurosat.models import onnx_session

    height, width = description["tile_size"]
    grey_HWC = np.full((height, width, description["bands"]), GREY, np.uint8)
    probabilities = {
        name: onnx_session.probabilities(file, grey_HWC[None])[0].tolist()
        for name, file in networks.items()
    }
    lineage_file = folder.parent / "lineage.json"
    own = {
        "example_probabilities": probabilities,
        "sha256": {name: sha256_of(file) for name, file in networks.items()},
    }
    lineage_file.write_text(json.dumps({**origin, **own}, indent=1))
    artifacts = {name: str(file) for name, file in networks.items()}
    is_rgb = description["bands"] == len("RGB")
    requirements = PYFUNC_REQUIREMENTS if is_rgb else (*PYFUNC_REQUIREMENTS, *BAND_REQUIREMENTS)
    params = [
        ParamSpec("top_k", "integer", 0),
        ParamSpec("tta", "boolean", description["views"] > 1),
        ParamSpec("explain", "boolean", False),
    ]
    mlflow.pyfunc.save_model(
        folder,
        python_model=str(PYFUNC),
        artifacts={"lineage": str(lineage_file), **artifacts},
        signature=ModelSignature(
            inputs=Schema([ColSpec("binary", "image")]), params=ParamSchema(params)
        ),
        input_example=_input_example(grey_HWC) if is_rgb else None,
        model_config=MODEL_CONFIG,
        pip_requirements=pinned_requirements(requirements),
    )


def _input_example(tile_HWC: "npt.NDArray[np.uint8]") -> "pd.DataFrame":
    """Return the tile as PNG bytes in a table of one row."""
    import pandas as pd
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(tile_HWC).save(file, "PNG")
    return pd.DataFrame({"image": [file.getvalue()]})


def main(argv: Sequence[str]) -> int:
    parser = cli.parser(
        "registry.register",
        "Wrap a finished training run as a version of the registered model, and print its number.",
    )
    parser.add_argument("run", metavar="RUN", help="run id, runs:/ID, or a sweep's parent run")
    parser.add_argument("--model", default=versions.MODEL, help="registered model")
    parser.add_argument("--alias", default=versions.CHALLENGER, help="alias of the new version")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    number = register(args.run, args.model, args.alias)
    print(number)
    outcome.report(args.model, number)
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
