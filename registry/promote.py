"""Judge a version against the champion, and let it take the champion's place."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eurosat import cli, logs, tracking
from eurosat.errors import ConfigError, TrackingError
from registry import evidence, gates, ledger, tables, versions

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger(__name__)

SETTLE_S = 5.0
"""Time that another promotion has to move its aliases after its entry in the ledger."""
VALIDATION = "data.validation"
VERDICT = "verdict"
"""Tag of a judged version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """What the registry held before the judgement."""

    predecessor: str
    """Digest that the next entry of the ledger names."""
    champion: "ModelVersion | None"


def standing(model: str, settle_s: float = SETTLE_S) -> Standing:
    """Read the ledger, then the alias: whoever promotes in between is found when entering.

    Where the two differ, a promotion is under way (waited for), was cut off, or was made by hand.
    """
    deadline = time.monotonic() + settle_s
    while True:
        predecessor, last = ledger.head(model)
        champion = versions.by_alias(model, versions.CHAMPION)
        held, entered = champion and str(champion.version), last and last.to_version
        if held == entered:
            break
        if time.monotonic() > deadline:
            log.warning(
                "champion is version %s where the ledger says %s: it was moved outside promote",
                held or "none",
                entered or "none",
            )
            break
        time.sleep(0.1)
    return Standing(predecessor=predecessor, champion=champion)


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
    compared = evidence.compare(
        evidence.read(run.run_id),
        evidence.read(versions.run_of(champion)) if champion else None,
        accept_new_data=accept_new_data,
    )
    verdict = gates.judge(compared.candidate, compared.champion, bars, notes=compared.notes)
    first = [validation.refusal] if validation.refusal else []
    return gates.Verdict(
        findings=(validation, *verdict.findings),
        refusals=(*first, *compared.refusals, *verdict.refusals),
        notes=verdict.notes,
    )


def promote(
    model: str,
    candidate: "ModelVersion",
    before: Standing,
    verdict: gates.Verdict,
    why: str,
) -> None:
    """Enter the promotion, then move the aliases.

    Raises:
        LedgerConflictError: another promotion was entered first; no alias was moved.
    """
    assert verdict.passed
    number = str(candidate.version)
    old = str(before.champion.version) if before.champion else None
    entry = ledger.Entry(
        time=ledger.now(),
        actor=tracking.user(),
        from_version=old,
        to_version=number,
        why=why,
        verdict=str(verdict),
        previous=before.predecessor,
    )
    ledger.append(model, entry)
    challenger = versions.by_alias(model, versions.CHALLENGER)
    with tracking.explained(f"aliases of {model}"):
        client = versions.client()
        client.set_model_version_tag(model, number, VERDICT, str(verdict))
        if old:
            client.set_registered_model_alias(model, versions.PREVIOUS, old)
        client.set_registered_model_alias(model, versions.CHAMPION, number)
        if challenger and str(challenger.version) == number:
            client.delete_registered_model_alias(model, versions.CHALLENGER)


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
    before = standing(args.model)
    candidate = _candidate(args.model, args.version)
    number, champion = str(candidate.version), before.champion
    if champion and str(champion.version) == number:
        print(f"{args.model} version {number} is the champion already")
        return cli.OK
    verdict = judge(candidate, champion, bars, accept_new_data=args.accept_new_data)
    show(verdict)
    if not verdict.passed:
        with tracking.explained(f"tag of version {number}"):
            versions.client().set_model_version_tag(args.model, number, VERDICT, str(verdict))
        return cli.NEGATIVE
    promote(args.model, candidate, before, verdict, args.why)
    was = f"version {champion.version} before" if champion else "none before"
    print(f"{args.model} version {number} is the champion ({was})")
    return cli.OK


def _candidate(model: str, number: str | None) -> "ModelVersion":
    if number:  # MLproject's default is empty
        if not number.isdecimal():
            raise ConfigError(f"VERSION must be a whole number, such as 3; got {number!r}")
        return versions.get(model, number)
    found = versions.by_alias(model, versions.CHALLENGER)
    if found is None:
        raise TrackingError(
            f"{model} has no challenger: name a VERSION, or run `python -m registry.register RUN`"
        )
    return found


if __name__ == "__main__":
    cli.finish(main)
