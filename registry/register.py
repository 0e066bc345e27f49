"""Wrap a finished training run as a version of the registered model."""

import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eurosat import tracking
from eurosat.errors import ConfigError, ModelError, TrackingError
from eurosat.runtime import cli, exit_codes, logs
from registry import card, evidence, robustness, versions
from registry.versions import NETWORK, NETWORK_INT8

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
PYFUNC = ROOT / "serving" / "pyfunc.py"
LOCK = ROOT / "requirements.lock"
SERVED_BY = ("mlflow", "numpy", "onnxruntime", "pandas", "pillow", "simplejpeg")
"""What ``serving/pyfunc.py`` imports; pinned in the model as in the lock."""
READS_BANDS = ("rasterio",)
"""What it imports beside for tiles of other bands than red, green and blue."""
FOLDER = "model"
"""Of the run's artifacts, where the wrapped model is kept."""
SETTINGS = {"precision": "auto", "threads": 0, "max_batch": 16, "max_wait_ms": 2.0}
"""Of ``serving/pyfunc.py``. Whoever loads a model may change those that it was saved with."""
NEEDED = (NETWORK, evidence.PREDICTIONS, "config.yaml", "split.csv")
TAGS = ("data.fingerprint", "split.fingerprint", "code.commit", "config.digest")
VALIDATION = "data.validation"
GREY = 128
"""Of the input example: in the middle of the pixels' range."""


def register(reference: str, model: str, alias: str) -> str:
    """The number of the version that wraps the run, made unless it is there.

    Its network is asked about corrupted tiles too, unless it was or they are not here.

    Raises:
        TrackingError: no such run, it is not finished, or it lacks an artifact or a tag.
        ModelError: its network or its predictions are not what this project's training writes.
    """
    if alias in (versions.CHAMPION, versions.PREVIOUS):
        raise ConfigError(
            f"the alias {alias} is given by `python -m registry.promote`, which asks the gates"
        )
    run = tracking.get(tracking.resolve_run(reference))
    known = [v for v in versions.all_of(model) if v.run_id == run.run_id]
    if known:
        number = str(known[-1].version)
        log.info("%s version %s already wraps run %s", model, number, run.run_id)
        asked = robustness.ensure(run.run_id)
    else:
        _check(run)
        asked = robustness.ensure(run.run_id)  # before a webhook lets the version be judged
        number = _create(run, model)
        log.info("run %s is %s version %s", run.run_id, model, number)
    champion = versions.by_alias(model, versions.CHAMPION)
    if champion is None or str(champion.version) != number:
        _give(alias, model, number)
    if asked or not known:
        card.write(model, number)
    return number


def _give(alias: str, model: str, number: str) -> None:
    """Unless it was judged meanwhile, by a webhook, or aliases are not for this user to give."""
    from mlflow.exceptions import MlflowException

    with tracking.translate_errors(f"alias {alias}"):
        if versions.VERDICT in versions.get(model, number).tags:
            return
        try:
            versions.client().set_registered_model_alias(model, alias, number)
        except MlflowException as error:
            if error.error_code != versions.DENIED or alias != versions.CHALLENGER:
                raise
            log.info("the promoter gives version %s the alias %s, once it is judged", number, alias)


def pins(names: Sequence[str] = SERVED_BY, lock: Path = LOCK) -> list[str]:
    """``name==version`` for this Python and platform, as in the lock.

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
            raise ConfigError(f"{lock} holds a line that is no requirement: {line}") from error
        if requirement.marker is None or requirement.marker.evaluate():
            locked[requirement.name] = f"{requirement.name}{requirement.specifier}"
    lacking = [name for name in names if name not in locked]
    if lacking:
        raise ConfigError(f"{lock} does not pin {', '.join(lacking)}")
    return [locked[name] for name in names]


def describe(network: Path) -> dict[str, Any]:
    """Classes, tile size and bands that the network carries.

    Raises:
        ModelError: not ONNX, or not of the form that ``eurosat.models.export`` writes.
    """
    from eurosat.models import onnx_session

    try:
        session = onnx_session.open_session(network)
    except Exception as error:  # onnxruntime's errors share no base class but this
        first = str(error).splitlines()[0][:200]
        raise ModelError(f"{NETWORK} is no network that ONNX Runtime opens: {first}") from error
    interface = [(node.name, node.type) for node in (*session.get_inputs(), *session.get_outputs())]
    expected = [("tiles_NHWC", "tensor(uint8)"), ("probabilities", "tensor(float)")]
    if interface[: len(expected)] != expected:
        raise ModelError(f"{NETWORK} takes and gives {interface}, not {expected}: export it again")
    properties = session.get_modelmeta().custom_metadata_map
    try:
        told = {key: json.loads(properties[key]) for key in ("classes", "tile_size", "bands")}
        return told | {"views": json.loads(properties.get("views", "1"))}
    except (KeyError, ValueError) as error:
        raise ModelError(f"{NETWORK} lacks or garbles its property {error}") from error


def _check(run: tracking.RunRecord) -> None:
    if run.status != "FINISHED":
        raise TrackingError(
            f"run {run.run_id} is {run.status}: only a FINISHED training run can be registered"
        )
    held = versions.held(run.run_id)
    lacking = [name for name in NEEDED if name not in held]
    lacking += [f"the tag {name}" for name in (*TAGS, VALIDATION) if name not in run.tags]
    if lacking:
        raise TrackingError(
            f"run {run.run_id} lacks {', '.join(lacking)}: name a run of `python -m eurosat.train` "
            "or of a sweep"
        )


def _create(run: tracking.RunRecord, model: str) -> str:
    with ExitStack() as stack:
        names = {"network": NETWORK}
        if NETWORK_INT8 in versions.held(run.run_id):
            names["network_int8"] = NETWORK_INT8
        networks = {
            artifact: stack.enter_context(tracking.artifact(run.run_id, name))
            for artifact, name in names.items()
        }
        described = describe(networks["network"])
        tested = evidence.read(run.run_id).classes
        if tested != described["classes"]:
            raise ModelError(
                f"{NETWORK} knows the classes {', '.join(described['classes'])} but "
                f"{evidence.PREDICTIONS} is of {', '.join(tested)}"
            )
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = scratch / FOLDER
        _wrap(networks, described, lineage(run, described), folder)
        versions.ensure(model, "Land cover of satellite tiles")
        with tracking.translate_errors(f"run {run.run_id}"):
            client = versions.client()
            client.log_artifacts(run.run_id, str(folder), FOLDER)
            source = f"{client.get_run(run.run_id).info.artifact_uri}/{FOLDER}"
            tags = {name: run.tags[name] for name in (*TAGS, VALIDATION)}
            tags[versions.FILES] = json.dumps(listed(folder))
            return str(client.create_model_version(model, source, run.run_id, tags=tags).version)


def listed(folder: Path) -> dict[str, tuple[str, int]]:
    """sha256 and size in bytes of each file below."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_size,
        )
        for path in files
    }


def lineage(run: tracking.RunRecord, described: Mapping[str, Any]) -> dict[str, Any]:
    """Where the model is from, as it travels beside the network."""
    return {
        "run_id": run.run_id,
        **{name.replace(".", "_"): run.tags[name] for name in (*TAGS, VALIDATION)},
        **described,
        "metrics": {k: v for k, v in sorted(run.metrics.items()) if k.startswith("test_")},
    }


def _wrap(
    networks: Mapping[str, Path],
    described: Mapping[str, Any],
    origin: Mapping[str, Any],
    folder: Path,
) -> None:
    """Write the MLflow model: code by path, no pickle; its lineage tells the example's answers."""
    import mlflow.pyfunc
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    from eurosat.models import onnx_session

    height, width = described["tile_size"]
    grey_HWC = np.full((height, width, described["bands"]), GREY, np.uint8)
    answers = {
        name: onnx_session.probabilities(file, grey_HWC[None])[0].tolist()
        for name, file in networks.items()
    }
    written = folder.parent / "lineage.json"
    written.write_text(json.dumps({**origin, "example_probabilities": answers}, indent=1))
    in_colours = described["bands"] == len("RGB")
    params = [
        ParamSpec("top_k", "integer", 0),
        ParamSpec("tta", "boolean", described["views"] > 1),
        ParamSpec("explain", "boolean", False),
    ]
    mlflow.pyfunc.save_model(
        folder,
        python_model=str(PYFUNC),
        artifacts={"lineage": str(written)} | {name: str(file) for name, file in networks.items()},
        signature=ModelSignature(
            inputs=Schema([ColSpec("binary", "image")]), params=ParamSchema(params)
        ),
        input_example=_example(grey_HWC) if in_colours else None,
        model_config=SETTINGS,
        pip_requirements=pins(SERVED_BY if in_colours else (*SERVED_BY, *READS_BANDS)),
    )


def _example(tile_HWC: "npt.NDArray[np.uint8]") -> "pd.DataFrame":
    """The tile as PNG bytes."""
    import io

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
    parser.add_argument("--alias", default=versions.CHALLENGER, help="given to the version")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    print(register(args.run, args.model, args.alias))
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
