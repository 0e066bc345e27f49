"""Judge a version against the champion, and let it take the champion's place."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eurosat import tracking
from eurosat.errors import ConfigError, TrackingError
from eurosat.runtime import cli, exit_codes, logs
from registry import gates, ledger, versions
from registry.judge import judge, show, tag
from registry.reconcile import Standing, enter, reconcile, rival

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


def promote(
    model: str,
    candidate: "ModelVersion",
    before: Standing,
    verdict: gates.Verdict,
    why: str,
    actor: str,
) -> None:
    """Leave the verdict with the version, and make it the champion.

    Raises:
        LedgerConflictError: another entry came first; no alias was moved.
    """
    assert verdict.passed
    number = str(candidate.version)
    tag(model, number, verdict)
    enter(
        model, before, ledger.PROMOTE, number, why, actor, str(verdict), evidence=verdict.evidence
    )


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
        help="the champion was tested on other tiles: let the bounds alone judge",
    )
    parser.add_argument(
        "--accept-uncommitted",
        action="store_true",
        help="no commit holds the code that made it: enter that, and let the other gates judge",
    )
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    bars = gates.load(args.gates)
    if len(args.why) > ledger.MAX_WHY:
        raise ConfigError(f"--why has {len(args.why)} characters, over {ledger.MAX_WHY}")
    before = reconcile(args.model)
    candidate = _candidate(args.model, args.version)
    number, champion = str(candidate.version), rival(args.model, before)
    if before.number == number:
        print(f"{args.model} version {number} is the champion already")
        return exit_codes.OK
    verdict = judge(
        candidate,
        champion,
        bars,
        accept_new_data=args.accept_new_data,
        accept_uncommitted=args.accept_uncommitted,
    )
    show(verdict)
    if not verdict.passed:
        tag(args.model, number, verdict)
        return exit_codes.NEGATIVE
    promote(args.model, candidate, before, verdict, args.why, args.by or tracking.user())
    print(before.followed_by(args.model, number))
    return exit_codes.OK


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
    cli.run_command(main)
