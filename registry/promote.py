"""Judge a version against the champion, and make it the champion if it passes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eurosat.errors import ConfigError, TrackingError
from eurosat.runtime import cli, exit_codes, logs
from registry import gates, ledger, versions
from registry.actor import actor
from registry.judge import judge_version, record_verdict
from registry.reconcile import RegistryState, append_and_apply, baseline, reconcile
from registry.verdict import Verdict, print_summary

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


def promote(
    model: str,
    candidate: "ModelVersion",
    before: RegistryState,
    verdict: Verdict,
    why: str,
    by: str,
) -> None:
    """Record the verdict with the version, and make the version the champion.

    Raises:
        LedgerConflictError: another entry came first; no alias was moved.
    """
    assert verdict.passed
    number = str(candidate.version)
    record_verdict(model, number, verdict)
    append_and_apply(
        model,
        before,
        ledger.PROMOTE,
        number,
        why,
        by,
        str(verdict),
        evidence=verdict.evidence,
    )


def main(argv: Sequence[str]) -> int:
    parser = cli.parser(
        "registry.promote",
        "Judge the challenger, or VERSION, against the champion on their common test tiles. If it "
        "passes every gate, make it champion; otherwise print the reasons and exit with 1.",
    )
    parser.add_argument("version", nargs="?", metavar="VERSION", help="default: the challenger")
    parser.add_argument("--why", default="it passed every gate", help="reason, for the ledger")
    parser.add_argument("--by", help="person for whom you act; recorded beside your account")
    parser.add_argument("--model", default=versions.MODEL, help="registered model")
    parser.add_argument(
        "--gates", type=Path, default=gates.default_file(), help="TOML, one table per gate"
    )
    parser.add_argument(
        "--accept-new-data",
        action="store_true",
        help="if the champion was tested on other tiles: apply only the fixed limits",
    )
    parser.add_argument(
        "--accept-uncommitted",
        action="store_true",
        help="accept a model whose code is not committed; the ledger records it",
    )
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    limits = gates.load(args.gates)
    if len(args.why) > ledger.MAX_WHY:
        raise ConfigError(
            f"--why has {len(args.why)} characters, over {ledger.MAX_WHY}: give a shorter reason"
        )
    before = reconcile(args.model)
    candidate = _candidate(args.model, args.version)
    number, champion = str(candidate.version), baseline(args.model, before)
    if before.champion_number == number:
        print(f"{args.model} version {number} is the champion already")
        return exit_codes.OK
    verdict = judge_version(
        candidate,
        champion,
        limits,
        accept_new_data=args.accept_new_data,
        accept_uncommitted=args.accept_uncommitted,
    )
    print_summary(verdict)
    print(f"all gates: python -m registry.judge {number}{_model_flag(args.model)}")
    if not verdict.passed:
        record_verdict(args.model, number, verdict)
        return exit_codes.NEGATIVE
    promote(args.model, candidate, before, verdict, args.why, actor(args.by))
    print(before.describe_change(args.model, number))
    return exit_codes.OK


def _model_flag(model: str) -> str:
    return "" if model == versions.MODEL else f" --model {model}"


def _candidate(model: str, number: str | None) -> "ModelVersion":
    if number:  # MLproject passes an empty default
        return versions.from_argument(model, number)
    challenger = versions.by_alias(model, versions.CHALLENGER)
    if challenger is None:
        raise TrackingError(
            f"{model} has no challenger: name a VERSION, or run `python -m registry.register RUN`"
        )
    return challenger


if __name__ == "__main__":
    cli.run_command(main)
