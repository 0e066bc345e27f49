"""The gates that pass or fail without a limit: data, lineage, interface, approval and files."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eurosat import tracking
from eurosat.errors import ModelError
from eurosat.models import version_files
from eurosat.runtime.digests import sha256_of
from registry import register, versions
from registry.approvals import APPROVAL_TAG, APPROVED, RETIRED_TAG, ReviewDecision
from registry.evidence import Predictions
from registry.gates import BooleanGate
from registry.verdict import EMPTY, GateResult

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

UNKNOWN_COMMIT, DIRTY_SUFFIX = "unknown", "-dirty"
"""What `eurosat.tracking.code_commit` reports without git, and after a commit that differs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedVersion:
    """What MLflow stores of a candidate, and of the champion if there is one."""

    version: "ModelVersion"
    run: tracking.RunRecord
    predictions: Predictions
    training_tiles: set[str]
    """sha256 of the tiles of the training and validation folds."""
    champion: "ModelVersion | None" = None
    champion_run_id: str | None = None
    champion_predictions: Predictions | None = None
    champion_training_tiles: set[str] = field(default_factory=set)
    accept_uncommitted: bool = False

    @property
    def all_training_tiles(self) -> set[str]:
        """Return the tiles that either version was trained with."""
        return self.training_tiles | self.champion_training_tiles

    @property
    def commit(self) -> str:
        """Return the tag ``code.commit`` of the run, or an empty string."""
        return self.run.tags.get("code.commit", "")


def judge_booleans(
    subject: JudgedVersion, gates: tuple[BooleanGate, ...]
) -> tuple[GateResult, ...]:
    return tuple(CHECKS[gate.name](subject, gate) for gate in gates)


def uncommitted_note(subject: JudgedVersion) -> tuple[str, ...]:
    """Return a note if only ``--accept-uncommitted`` let the candidate's code pass."""
    commit = subject.commit
    if subject.accept_uncommitted and (commit == UNKNOWN_COMMIT or commit.endswith(DIRTY_SUFFIX)):
        return (f"the code of this model is not committed ({commit[:12]}), which was accepted",)
    return ()


def _result(gate: BooleanGate, value: str, refusal: str = "", limit: str = EMPTY) -> GateResult:
    return GateResult(
        gate=gate.name, value=value, refusal=refusal, limit=limit, why=gate.why, off=gate.off
    )


def _data_validation(subject: JudgedVersion, gate: BooleanGate) -> GateResult:
    state = subject.run.tags.get(register.VALIDATION_TAG)
    refusal = (
        f"data_validation: {state or 'not recorded'}, where 'passed' is needed: run "
        "`python -m expectations.validate` and train again"
    )
    return _result(gate, state or EMPTY, "" if state == "passed" else refusal, limit="passed")


def _leakage(subject: JudgedVersion, gate: BooleanGate) -> GateResult:
    """Refuse test tiles that were used for training or for choosing weights."""
    tiles = set(subject.predictions.frame["sha256"])
    leaked = len(tiles & subject.training_tiles)
    refusal = (
        f"leakage: {leaked} of {len(tiles)} test tiles were used in training: train again with a "
        "split made by this project"
    )
    return _result(gate, str(leaked), refusal if leaked else "", limit="0")


def _lineage(subject: JudgedVersion, gate: BooleanGate) -> GateResult:
    missing = [name for name in register.LINEAGE_TAGS if not subject.run.tags.get(name)]
    refusal = ""
    if missing:
        refusal = f"lineage: the run lacks the tags {', '.join(missing)}: train again"
    elif subject.commit == UNKNOWN_COMMIT and not subject.accept_uncommitted:
        refusal = (
            "lineage: the commit of the code is unknown: train in a git checkout, or pass "
            "--accept-uncommitted, which the ledger records"
        )
    return _result(gate, subject.commit.removesuffix(DIRTY_SUFFIX)[:12] or EMPTY, refusal)


def _committed(subject: JudgedVersion, gate: BooleanGate) -> GateResult:
    """Refuse code that differed from its commit."""
    commit = subject.commit
    if not commit.endswith(DIRTY_SUFFIX):
        return _result(gate, EMPTY if commit in ("", UNKNOWN_COMMIT) else "yes", limit="yes")
    refusal = (
        f"committed: the code differed from its commit {commit[:12]}: commit it and train again, "
        "or pass --accept-uncommitted, which the ledger records"
    )
    return _result(gate, "no", "" if subject.accept_uncommitted else refusal, limit="yes")


def _signature(subject: JudgedVersion, gate: BooleanGate) -> GateResult:
    """Refuse other inputs, parameters or classes than the champion's."""
    if gate.off or subject.champion is None or subject.champion_predictions is None:
        return _result(gate, EMPTY)
    candidates, champions = _interface(subject.version), _interface(subject.champion)
    classes, champions_classes = subject.predictions.classes, subject.champion_predictions.classes
    run_id = subject.run.run_id
    other_model = (
        f"give it a model of its own: `python -m registry.register {run_id} --model NAME`, and "
        "--model NAME for every command of the registry"
    )
    refusal = ""
    if candidates != champions:
        refusal = f"signature: it takes {candidates}, the champion {champions}: {other_model}"
    elif classes != champions_classes:
        refusal = (
            f"signature: its classes are {', '.join(classes)}, the champion's "
            f"{', '.join(champions_classes)}: {other_model}"
        )
    return _result(gate, "different" if refusal else "equal", refusal, limit="equal")


def _interface(version: "ModelVersion") -> dict[str, Any]:
    """Return the inputs and parameters that a version declares."""
    from mlflow.models import get_model_info

    with tracking.translate_errors(f"signature of version {version.version}"):
        signature = get_model_info(f"models:/{version.name}/{version.version}").signature
    inputs = signature.inputs.to_dict() if signature and signature.inputs else []
    params = signature.params.to_dict() if signature and signature.params else []
    return {
        "inputs": inputs,
        "params": [{name: param.get(name) for name in ("name", "type")} for param in params],
    }


def _approval(subject: JudgedVersion, gate: BooleanGate) -> GateResult:
    """Refuse until `registry.approve` has recorded an approval."""
    if gate.off:
        return _result(gate, EMPTY)
    number = subject.version.version
    command = f"`python -m registry.approve {number} --why ...`"
    review = ReviewDecision.from_tag(subject.version, APPROVAL_TAG)
    if review is None:
        refusal = f"approval: version {number} waits for a person: run {command}"
        return _result(gate, "waits", refusal)
    value = f"{review.decision} by {review.by}"
    refusal = f"approval: {value}: {review.why}; {command} approves it"
    return _result(gate, value, "" if review.decision == APPROVED else refusal)


def _retired(subject: JudgedVersion, gate: BooleanGate) -> GateResult:
    if gate.off or RETIRED_TAG not in subject.version.tags:
        return _result(gate, EMPTY)
    review = ReviewDecision.from_tag(subject.version, RETIRED_TAG)
    by, why = (review.by, review.why) if review else ("somebody", "the reason cannot be read")
    return _result(gate, f"by {by}", f"retired: by {by}: {why}; promote another version")


def _files(subject: JudgedVersion, gate: BooleanGate) -> GateResult:
    """Refuse files that differ from the registered ones, and code that was not released."""
    from mlflow.artifacts import download_artifacts

    if gate.off:
        return _result(gate, EMPTY)
    version = subject.version
    again = (
        f"delete version {version.version} in MLflow, then run "
        f"`python -m registry.register {subject.run.run_id}`"
    )
    registered = versions.registered_digests(version)
    if not registered:
        return _result(gate, EMPTY, f"files: their sha256 was not recorded: {again}")
    with tempfile.TemporaryDirectory() as folder:
        with tracking.translate_errors("files of the version"):
            uri = f"models:/{version.name}/{version.version}"
            downloaded = Path(download_artifacts(uri, dst_path=folder))
        try:
            stored = version_files.check(downloaded)
            version_files.check_unchanged(stored, registered)
        except ModelError as error:
            fault = str(error).removesuffix(f": {version_files.REMEDY}")
            return _result(gate, "changed", f"files: {fault}: {again}")
    if foreign := _foreign_networks(version, stored):
        names = ", ".join(foreign)
        reason = f"files: {names} is not the network that its run has trained: {again}"
        return _result(gate, "changed", reason)
    return _result(gate, f"{len(stored)} intact")


def _foreign_networks(version: "ModelVersion", stored: Mapping[str, str]) -> list[str]:
    """Return the networks that differ from those of the version's run."""
    return [
        name
        for name, sha256 in stored.items()
        if name.endswith(".onnx") and sha256 != _trained_sha256(version, Path(name).name)
    ]


def _trained_sha256(version: "ModelVersion", name: str) -> str:
    """Return the sha256 of a network among the artifacts of the version's run."""
    with tracking.artifact(versions.run_of(version), name) as file:
        return sha256_of(file)


CHECKS: dict[str, Callable[[JudgedVersion, BooleanGate], GateResult]] = {
    "data_validation": _data_validation,
    "leakage": _leakage,
    "lineage": _lineage,
    "committed": _committed,
    "signature": _signature,
    "approval": _approval,
    "retired": _retired,
    "files": _files,
}
"""The check of each gate of `registry.gates.BOOLEAN_GATES`."""
