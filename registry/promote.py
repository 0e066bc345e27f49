"""Judge a version against the champion, and let it take the champion's place."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eurosat import cli, logs, tracking
from eurosat.errors import ConfigError, TrackingError
from registry import evidence, gates, ledger, tables, versions
from registry.reconcile import Standing, reconcile

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

VALIDATION = "data.validation"
VERDICT = "verdict"
"""Tag of a judged version."""


def judge(
    candidate: "ModelVersion",
    champion: "ModelVersion | None",
    bars: tuple[gates.Gate, ...],
    *,
    accept_new_data: bool = False,
) -> gates.Verdict:
    """Judge by what the two versions' runs hold.

    Raises:
        TrackingError: a run or its predictions cannot be read.
        ModelError: the predictions are not what training writes.
    """
    run = tracking.get(versions.run_of(candidate))
    validation = gates.judge_validation(run.tags.get(VALIDATION))
    ours = evidence.read(run.run_id)
    theirs = evidence.read(versions.run_of(champion)) if champion else None
    compared = evidence.compare(ours, theirs, accept_new_data=accept_new_data)
    verdict = gates.judge(compared.candidate, compared.champion, bars, notes=compared.notes)
    first = [validation.refusal] if validation.refusal else []
    return gates.Verdict(
        findings=(validation, *verdict.findings),
        refusals=(*first, *compared.refusals, *verdict.refusals),
        notes=verdict.notes,
        evidence=evidence.digest([ours, *([theirs] if theirs else [])], bars),
    )


def promote(
    model: str,
    candidate: "ModelVersion",
    before: Standing,
    verdict: gates.Verdict,
    why: str,
    actor: str,
) -> None:
    """Enter the promotion, then let the aliases follow.

    Raises:
        LedgerConflictError: another entry came first; no alias was moved.
    """
    assert verdict.passed
    number = str(candidate.version)
    tag(model, number, verdict)
    entry = ledger.Entry(
        time=ledger.now(),
        actor=actor,
        from_version=str(before.champion.version) if before.champion else None,
        to_version=number,
        why=why,
        verdict=str(verdict),
        previous=before.predecessor,
        evidence=verdict.evidence,
    )
    ledger.append(model, entry)
    reconcile(model)


def tag(model: str, number: str, verdict: gates.Verdict) -> None:
    with tracking.explained(f"tag of version {number}"):
        versions.client().set_model_version_tag(model, number, VERDICT, str(verdict))


def show(verdict: gates.Verdict) -> None:
    from rich.table import Table

    table = Table("gate", "value", "champion's", "bar", "verdict", "why")
    for found in verdict.findings:
        word = "refused" if found.refusal else "passed"
        table.add_row(found.gate, found.value, found.champion, found.bar, word, found.why)
    tables.show(table)
    for note in verdict.notes:
        print(f"note: {note}")
    for refusal in verdict.refusals:
        print(f"refused: {refusal}")


def main(argv: Sequence[str]) -> int:
    parser = cli.parser(
        "registry.promote",
        "Judge the challenger, or VERSION, against the champion on the test tiles of both; make "
        "it champion, or refuse with reasons and exit 1.",
    )
    parser.add_argument("version", nargs="?", metavar="VERSION", help="default: the challenger")
    parser.add_argument("--why", default="it passed every gate", help="entered in the ledger")
    parser.add_argument("--by", help="who promotes; default: the user")
    parser.add_argument("--model", default=versions.MODEL, help="registered model")
    parser.add_argument("--gates", type=Path, default=gates.FILE, help="TOML, a table per figure")
    parser.add_argument(
        "--accept-new-data",
        action="store_true",
        help="the champion was tested on other tiles: let the floors alone judge",
    )
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    bars = gates.load(args.gates)
    if len(args.why) > ledger.MAX_WHY:
        raise ConfigError(f"--why has {len(args.why)} characters, over {ledger.MAX_WHY}")
    before = reconcile(args.model)
    candidate = _candidate(args.model, args.version)
    number, champion = str(candidate.version), before.champion
    if champion and str(champion.version) == number:
        print(f"{args.model} version {number} is the champion already")
        return cli.OK
    verdict = judge(candidate, champion, bars, accept_new_data=args.accept_new_data)
    show(verdict)
    if not verdict.passed:
        tag(args.model, number, verdict)
        return cli.NEGATIVE
    promote(args.model, candidate, before, verdict, args.why, args.by or tracking.user())
    was = f"version {champion.version} before" if champion else "none before"
    print(f"{args.model} version {number} is the champion ({was})")
    return cli.OK


def _candidate(model: str, number: str | None) -> "ModelVersion":
    if number:  # MLproject's default is empty
        return versions.named(model, number)
    found = versions.by_alias(model, versions.CHALLENGER)
    if found is None:
        raise TrackingError(
            f"{model} has no challenger: name a VERSION, or run `python -m registry.register RUN`"
        )
    return found


if __name__ == "__main__":
    cli.finish(main)
