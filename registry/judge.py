"""Judge a version against the champion by what MLflow stores of both.

Nothing is computed again, except latency, which `--latency` measures on this machine.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eurosat import tracking
from eurosat.errors import ConfigError
from eurosat.runtime import cli, exit_codes, logs
from registry import boolean_gates, card, evidence, gates, latency, ledger, robustness, versions
from registry.boolean_gates import JudgedVersion
from registry.metric_gates import judge_difference, judge_metrics
from registry.reconcile import last_active
from registry.verdict import EMPTY, GateResult, Verdict, print_verdict

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

BYTES_PER_MB = 1e6


def judge_version(
    candidate: "ModelVersion",
    champion: "ModelVersion | None",
    limits: gates.Gates,
    *,
    accept_new_data: bool = False,
    accept_uncommitted: bool = False,
    measure_latency: bool = False,
) -> Verdict:
    """Judge by what MLflow stores of the two versions and their runs.

    ``measure_latency`` also times the networks of both, here and now.

    Raises:
        TrackingError: a run, its predictions or its split cannot be read.
        ModelError: predictions or split do not have the form that training writes.
    """
    subject = _load(candidate, champion, accept_uncommitted=accept_uncommitted)
    compared = evidence.compare(
        subject.predictions,
        subject.champion_predictions,
        subject.all_training_tiles,
        accept_new_data=accept_new_data,
    )
    corrupted = _compare_corrupted(subject, compared, limits)
    candidate_metrics = {
        **compared.candidate,
        **_served_metrics(subject.run, candidate),
        **_robustness_metric(corrupted.candidate),
    }
    champion_metrics = None
    if compared.champion is not None:
        champion_metrics = {**compared.champion, **_robustness_metric(corrupted.champion)}
    faults = {robustness.GATE: corrupted.fault}
    timings = None
    if measure_latency:
        timings = latency.compare(subject.run.run_id, subject.champion_run_id)
    return Verdict(
        results=(
            *boolean_gates.judge_booleans(subject, limits.booleans),
            _test_tiles(subject, compared),
            *judge_metrics(candidate_metrics, champion_metrics, limits.metrics, faults),
            judge_difference(compared.paired, limits.difference),
            *latency.judge_latency(timings, limits.latency),
        ),
        notes=(*compared.notes, *boolean_gates.uncommitted_note(subject)),
        evidence=_digest(subject, corrupted, limits),
    )


def _load(
    candidate: "ModelVersion", champion: "ModelVersion | None", *, accept_uncommitted: bool
) -> JudgedVersion:
    """Read the runs, predictions and splits of both versions."""
    run = tracking.get(versions.run_of(candidate))
    champion_run = versions.run_of(champion) if champion else None
    return JudgedVersion(
        version=candidate,
        run=run,
        predictions=evidence.read(run.run_id),
        training_tiles=evidence.training_tiles(run.run_id),
        champion=champion,
        champion_run_id=champion_run,
        champion_predictions=evidence.read(champion_run) if champion_run else None,
        champion_training_tiles=evidence.training_tiles(champion_run) if champion_run else set(),
        accept_uncommitted=accept_uncommitted,
    )


def _compare_corrupted(
    subject: JudgedVersion, compared: evidence.EvidenceComparison, limits: gates.Gates
) -> robustness.RobustnessComparison:
    """Compare predictions for corrupted tiles, unless the gate is missing or switched off."""
    if not any(gate.metric == robustness.GATE and not gate.off for gate in limits.metrics):
        return robustness.RobustnessComparison()
    champion = subject.champion_run_id if compared.champion else None
    return robustness.compare(subject.run.run_id, champion, subject.all_training_tiles)


def _test_tiles(subject: JudgedVersion, compared: evidence.EvidenceComparison) -> GateResult:
    champions = subject.champion_predictions
    return GateResult(
        gate="test_tiles",
        value=str(len(subject.predictions.frame)),
        refusal=compared.refusal,
        champion=str(len(champions.frame)) if champions else EMPTY,
        why="metrics of different tiles cannot be compared",
    )


def _digest(
    subject: JudgedVersion, corrupted: robustness.RobustnessComparison, limits: gates.Gates
) -> str:
    champions = [subject.champion_predictions] if subject.champion_predictions else []
    return evidence.digest([subject.predictions, *champions, *corrupted.sources], limits)


def _robustness_metric(value: float | None) -> dict[str, float]:
    return {} if value is None else {robustness.GATE: value}


def _served_metrics(run: tracking.RunRecord, version: "ModelVersion") -> dict[str, float]:
    """Return how far the served networks are from the trained one, and the largest's size."""
    metrics: dict[str, float] = {}
    if "onnx_difference" in run.metrics:
        metrics["onnx_difference"] = run.metrics["onnx_difference"]
    files = versions.registered_files(version)
    sizes = {name: size for name, (_, size) in files.items() if name.endswith(".onnx")}
    if sizes:
        metrics["size_mb"] = max(sizes.values()) / BYTES_PER_MB
    if not any(name.endswith(versions.NETWORK_INT8) for name in sizes):
        metrics["int8_loss"] = 0.0  # no INT8 network is served
    elif {"test_accuracy", "int8_accuracy"} <= run.metrics.keys():
        metrics["int8_loss"] = run.metrics["test_accuracy"] - run.metrics["int8_accuracy"]
    return metrics


def record_verdict(model: str, number: str, verdict: Verdict) -> None:
    """Store the verdict as the version's tag, and in its model card."""
    versions.set_tag(model, number, versions.VERDICT_TAG, str(verdict))
    card.write(model, number)


def main(argv: Sequence[str]) -> int:
    parser = cli.parser(
        "registry.judge",
        "Check VERSION against the gates; change nothing. Exit with 1 if it is refused.",
    )
    parser.add_argument("version", metavar="VERSION")
    parser.add_argument("--against", default=versions.CHAMPION, help="alias or version number")
    parser.add_argument("--model", default=versions.MODEL, help="registered model")
    parser.add_argument(
        "--gates", type=Path, default=gates.default_file(), help="TOML, one table per gate"
    )
    parser.add_argument("--accept-new-data", action="store_true", help="as in registry.promote")
    parser.add_argument("--accept-uncommitted", action="store_true", help="as in registry.promote")
    parser.add_argument("--latency", action="store_true", help="also time both networks here")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the verdict as JSON too")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    limits = gates.load(args.gates)
    candidate = versions.from_argument(args.model, args.version)
    against = _version_to_compare_with(args.model, args.against)
    verdict = judge_version(
        candidate,
        against,
        limits,
        accept_new_data=args.accept_new_data,
        accept_uncommitted=args.accept_uncommitted,
        measure_latency=args.latency,
    )
    print_verdict(verdict)
    if args.out:
        _write_json(args.out, candidate, against, verdict)
    return exit_codes.OK if verdict.passed else exit_codes.NEGATIVE


def _version_to_compare_with(model: str, reference: str) -> "ModelVersion | None":
    """Return the version with this number or alias, or the last active champion."""
    if reference.isdecimal():
        return versions.get(model, reference)
    if (version := versions.by_alias(model, reference)) is not None:
        return version
    number = last_active(model, ledger.rollback_stack(ledger.entries(model)))
    return versions.get(model, number) if number else None


def _write_json(
    file: Path, candidate: "ModelVersion", against: "ModelVersion | None", verdict: Verdict
) -> None:
    report: Mapping[str, object] = {
        "version": str(candidate.version),
        "against": str(against.version) if against else None,
        "passed": verdict.passed,
        "evidence": verdict.evidence,
        "findings": [result.as_dict() for result in verdict.results],
    }
    try:
        file.write_text(json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"--out {file}: {error.strerror}") from error


if __name__ == "__main__":
    cli.run_command(main)
