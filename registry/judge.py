"""Judge a version against the champion by what is stored of both.

Nothing is computed anew, but for what a machine of today takes where `--latency` asks for it.
"""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eurosat import tracking
from eurosat.errors import ConfigError
from eurosat.runtime import cli, exit_codes, logs
from registry import (
    card,
    evidence,
    gates,
    latency,
    ledger,
    register,
    robustness,
    tables,
    versions,
)
from registry.approvals import APPROVAL, APPROVED, RETIRED, Opinion
from registry.gates import Fact, Finding, Gates, Verdict
from registry.reconcile import last_kept

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

HARMLESS = (".json", ".onnx", ".py", ".txt", ".yaml")
"""Suffixes of a version's files, beside MLmodel: nothing that is unpickled."""
ADDED = "registered_model_meta"
"""What MLflow itself puts beside a version's files when it hands them out."""
MB = 1e6
UNKNOWN, DIRTY = "unknown", "-dirty"
"""What `eurosat.tracking.code_commit` says where git does not know, and after a commit."""


def judge(
    candidate: "ModelVersion",
    champion: "ModelVersion | None",
    bars: Gates,
    *,
    accept_new_data: bool = False,
    accept_uncommitted: bool = False,
    timed: bool = False,
) -> Verdict:
    """Judge by what the two versions and their runs hold; ``timed`` asks their networks too.

    Raises:
        TrackingError: a run, its predictions or its split cannot be read.
        ModelError: they are not what training writes.
    """
    run = tracking.get(versions.run_of(candidate))
    ours = evidence.read(run.run_id)
    rival = versions.run_of(champion) if champion else None
    theirs = evidence.read(rival) if rival else None
    learned = evidence.learned_from(run.run_id)
    known = learned | (evidence.learned_from(rival) if rival else set())
    compared = evidence.compare(ours, theirs, known, accept_new_data=accept_new_data)
    why = {fact.name: fact for fact in bars.facts}
    facts = (
        _validation(run, why["data_validation"]),
        _leakage(ours, learned, why["leakage"]),
        _lineage(run, why["lineage"], accepted=accept_uncommitted),
        _committed(run, why["committed"], accepted=accept_uncommitted),
        _signature(candidate, champion, ours, theirs, why["signature"]),
        _approval(candidate, why["approval"]),
        _retired(candidate, why["retired"]),
        _files(candidate, why["files"]),
    )
    comparable = Finding(
        gate="test_tiles",
        value=str(len(ours.frame)),
        refusal=compared.refusal,
        champion=str(len(theirs.frame)) if theirs else gates.NONE,
        why="figures of other tiles do not compare",
    )
    asked = robustness.Comparison()
    if any(gate.metric == robustness.GATE and not gate.off for gate in bars.figures):
        asked = robustness.compare(run.run_id, rival if compared.champion else None, known)
    stored = {**compared.candidate, **_stored(run, candidate), **_figure(asked.candidate)}
    against = compared.champion
    if against is not None:
        against = {**against, **_figure(asked.champion)}
    took = latency.compare(run.run_id, rival) if timed else None
    return Verdict(
        findings=(
            *facts,
            comparable,
            *gates.judge(stored, against, bars.figures, {robustness.GATE: asked.fault}),
            gates.judge_difference(compared.paired, bars.difference),
            *latency.judge(took, bars.latency),
        ),
        notes=(*compared.notes, *_accepted(run, accept_uncommitted)),
        evidence=evidence.digest([ours, *([theirs] if theirs else []), *asked.judged], bars),
    )


def _stored(run: tracking.RunRecord, version: "ModelVersion") -> dict[str, float]:
    """Figures of the served forms: how far they are from the trained network, and how large."""
    found: dict[str, float] = {}
    if "onnx_difference" in run.metrics:
        found["onnx_difference"] = run.metrics["onnx_difference"]
    files = versions.files_of(version)
    networks = {name: size for name, (_, size) in files.items() if name.endswith(".onnx")}
    if networks:
        found["size_mb"] = max(networks.values()) / MB
    if not any(name.endswith(versions.NETWORK_INT8) for name in networks):
        found["int8_loss"] = 0.0  # no such form is served
    elif {"test_accuracy", "int8_accuracy"} <= run.metrics.keys():
        found["int8_loss"] = run.metrics["test_accuracy"] - run.metrics["int8_accuracy"]
    return found


def _about(fact: Fact, value: str, refusal: str = "", bar: str = gates.NONE) -> Finding:
    return Finding(
        gate=fact.name, value=value, refusal=refusal, bar=bar, why=fact.why, off=fact.off
    )


def _validation(run: tracking.RunRecord, fact: Fact) -> Finding:
    state = run.tags.get(register.VALIDATION)
    refusal = (
        ""
        if state == "passed"
        else f"data_validation: {state or 'not recorded'}, where 'passed' is needed: run "
        "`python -m expectations.validate` and train again"
    )
    return _about(fact, state or gates.NONE, refusal, bar="passed")


def _leakage(ours: evidence.Predictions, learned: set[str], fact: Fact) -> Finding:
    """Test tiles that it has learned from."""
    tiles = set(ours.frame["sha256"])
    known = len(tiles & learned)
    refusal = (
        f"leakage: {known} of {len(tiles)} test tiles were learned from: train again on a "
        "split made by this project"
    )
    return _about(fact, str(known), refusal if known else "", bar="0")


def _figure(value: float | None) -> dict[str, float]:
    return {} if value is None else {robustness.GATE: value}


def _commit(run: tracking.RunRecord) -> str:
    return run.tags.get("code.commit", "")


def _lineage(run: tracking.RunRecord, fact: Fact, *, accepted: bool) -> Finding:
    lacking = [name for name in register.TAGS if not run.tags.get(name)]
    commit, refusal = _commit(run), ""
    if lacking:
        refusal = f"lineage: the run does not say {', '.join(lacking)}: train again"
    elif commit == UNKNOWN and not accepted:
        refusal = (
            "lineage: the commit of the code is unknown: train where git knows it, or let "
            "--accept-uncommitted enter that nobody does"
        )
    return _about(fact, commit.removesuffix(DIRTY)[:12] or gates.NONE, refusal)


def _committed(run: tracking.RunRecord, fact: Fact, *, accepted: bool) -> Finding:
    """Whether what the run has executed is what its commit holds."""
    commit = _commit(run)
    if not commit.endswith(DIRTY):
        return _about(fact, gates.NONE if commit in ("", UNKNOWN) else "yes", bar="yes")
    refusal = (
        f"committed: the code differed from its commit {commit[:12]}: commit it and train again, "
        "or let --accept-uncommitted enter that it did"
    )
    return _about(fact, "no", "" if accepted else refusal, bar="yes")


def _accepted(run: tracking.RunRecord, accepted: bool) -> tuple[str, ...]:
    """A note of what only ``--accept-uncommitted`` let pass."""
    commit = _commit(run)
    if accepted and (commit == UNKNOWN or commit.endswith(DIRTY)):
        return (f"the code that made it is not committed ({commit[:12]}), which was accepted",)
    return ()


def _signature(
    candidate: "ModelVersion",
    champion: "ModelVersion | None",
    ours: evidence.Predictions,
    theirs: evidence.Predictions | None,
    fact: Fact,
) -> Finding:
    """What clients send, and the classes that they are told."""
    if fact.off or champion is None or theirs is None:
        return _about(fact, gates.NONE)
    one, other = (_interface(version) for version in (candidate, champion))
    refusal = ""
    if one != other:
        refusal = f"signature: it takes {one}, and the champion {other}"
    elif ours.classes != theirs.classes:
        refusal = (
            f"signature: it tells {', '.join(ours.classes)} apart, and the champion "
            f"{', '.join(theirs.classes)}"
        )
    return _about(fact, "other" if refusal else "equal", refusal, bar="equal")


def _interface(version: "ModelVersion") -> dict[str, Any]:
    from mlflow.models import get_model_info

    with tracking.translate_errors(f"signature of version {version.version}"):
        signature = get_model_info(f"models:/{version.name}/{version.version}").signature
    inputs = signature.inputs.to_dict() if signature and signature.inputs else []
    params = signature.params.to_dict() if signature and signature.params else []
    return {
        "inputs": inputs,
        "params": [{name: one.get(name) for name in ("name", "type")} for one in params],
    }


def _approval(version: "ModelVersion", fact: Fact) -> Finding:
    """What `python -m registry.approve` has left with the version."""
    if fact.off:
        return _about(fact, gates.NONE)
    said = Opinion.of(version, APPROVAL)
    if said is None:
        return _about(
            fact,
            "waits",
            (
                f"approval: version {version.version} waits for a person: "
                f"`python -m registry.approve {version.version} --why ...`"
            ),
        )
    value = f"{said.word} by {said.by}"
    return _about(fact, value, "" if said.word == APPROVED else f"approval: {value}: {said.why}")


def _retired(version: "ModelVersion", fact: Fact) -> Finding:
    if fact.off or RETIRED not in version.tags:
        return _about(fact, gates.NONE)
    said = Opinion.of(version, RETIRED)
    by, why = (said.by, said.why) if said else ("somebody", "no reason can be read")
    return _about(fact, f"by {by}", f"retired: by {by}: {why}")


def _files(version: "ModelVersion", fact: Fact) -> Finding:
    """Every file of the version is the one that was registered, and none is unpickled."""
    from mlflow.artifacts import download_artifacts

    if fact.off:
        return _about(fact, gates.NONE)
    registered = {name: sha256 for name, (sha256, _) in versions.files_of(version).items()}
    if not registered:
        return _about(
            fact, gates.NONE, "files: their sha256 was not recorded: register its run anew"
        )
    with tempfile.TemporaryDirectory() as folder, tracking.translate_errors("files of the version"):
        held = register.listed(
            Path(download_artifacts(f"models:/{version.name}/{version.version}", dst_path=folder))
        )
    found = {name: sha256 for name, (sha256, _) in held.items()}
    changed = sorted({name for name, _ in found.items() ^ registered.items()} - {ADDED})
    strange = [name for name in found if not _harmless(name)]
    strangers = [
        name
        for name in found
        if name.endswith(".onnx") and found[name] != _trained(version, Path(name).name)
    ]
    refusal = ""
    if changed:
        refusal = f"files: {', '.join(changed[:3])} differ from what was registered"
    elif strangers:
        refusal = f"files: {', '.join(strangers)} is not the network that its run has trained"
    elif strange:
        refusal = f"files: {', '.join(strange[:3])} could be executed by whoever loads them"
    return _about(fact, f"{len(found)} intact" if not refusal else "changed", refusal)


def _trained(version: "ModelVersion", name: str) -> str:
    """sha256 of the network as training left it in the run."""
    with tracking.artifact(versions.run_of(version), name) as file:
        return hashlib.sha256(file.read_bytes()).hexdigest()


def _harmless(name: str) -> bool:
    return name in ("MLmodel", ADDED) or Path(name).suffix in HARMLESS


def show(verdict: Verdict) -> None:
    from rich.table import Table

    table = Table("gate", "value", "champion's", "bar", "verdict", "why")
    for found in verdict.findings:
        why = f"switched off: {found.off}" if found.off else found.why
        table.add_row(found.gate, found.value, found.champion, found.bar, found.verdict, why)
    tables.show(table)
    for note in verdict.notes:
        print(f"note: {note}")
    for refusal in verdict.refusals:
        print(f"refused: {refusal}")


def tag(model: str, number: str, verdict: Verdict) -> None:
    """Leave the verdict with the version, and in its card."""
    with tracking.translate_errors(f"tag of version {number}"):
        versions.client().set_model_version_tag(model, number, versions.VERDICT, str(verdict))
    card.write(model, number)


def main(argv: Sequence[str]) -> int:
    parser = cli.parser(
        "registry.judge",
        "Judge VERSION by what is stored of it, and change nothing: exit 1 where it is refused.",
    )
    parser.add_argument("version", metavar="VERSION")
    parser.add_argument("--against", default=versions.CHAMPION, help="an alias or a number")
    parser.add_argument("--model", default=versions.MODEL, help="registered model")
    parser.add_argument("--gates", type=Path, default=gates.FILE, help="TOML, a table per figure")
    parser.add_argument("--accept-new-data", action="store_true", help="as in registry.promote")
    parser.add_argument("--accept-uncommitted", action="store_true", help="as there")
    parser.add_argument("--latency", action="store_true", help="time both networks, here and now")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the verdict as JSON, beside")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    bars = gates.load(args.gates)
    candidate = versions.named(args.model, args.version)
    against = _against(args.model, args.against)
    verdict = judge(
        candidate,
        against,
        bars,
        accept_new_data=args.accept_new_data,
        accept_uncommitted=args.accept_uncommitted,
        timed=args.latency,
    )
    show(verdict)
    if args.out:
        told = {
            "version": str(candidate.version),
            "against": str(against.version) if against else None,
            "passed": verdict.passed,
            "evidence": verdict.evidence,
            "findings": [asdict(one) | {"verdict": one.verdict} for one in verdict.findings],
        }
        try:
            args.out.write_text(json.dumps(told, indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"--out {args.out}: {error.strerror}") from error
    return exit_codes.OK if verdict.passed else exit_codes.NEGATIVE


def _against(model: str, said: str) -> "ModelVersion | None":
    """The version of this number or alias, or the last champion there was."""
    if said.isdecimal():
        return versions.get(model, said)
    if (held := versions.by_alias(model, said)) is not None:
        return held
    last = last_kept(model, ledger.reigns(ledger.entries(model)))
    return versions.get(model, last) if last else None


if __name__ == "__main__":
    cli.run_command(main)
