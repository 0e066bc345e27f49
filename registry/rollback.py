"""Make an earlier champion the champion again."""

from collections.abc import Sequence

from eurosat.errors import ConfigError, TrackingError
from eurosat.runtime import cli, exit_codes, logs
from registry import ledger, versions
from registry.actor import actor
from registry.approvals import RETIRED_TAG, ReviewDecision
from registry.reconcile import RegistryState, append_and_apply, last_active, reconcile


def choose_target(model: str, state: RegistryState, requested: str | None) -> str:
    """Return the version to go back to: the requested one, or the champion before.

    Raises:
        ConfigError: the requested one never was champion, is champion now, or is retired.
        TrackingError: there is no earlier champion, or the requested one was deleted.
    """
    if requested is None:
        previous = last_active(model, state.earlier_champions)
        if previous is None:
            raise TrackingError(_no_previous(model, state.champion_number))
        return previous
    champions = {entry.to_version for entry in ledger.entries(model)} - {None}
    if state.champion_number == requested:
        raise ConfigError(f"{model} version {requested} is the champion now: choose another --to")
    if requested not in champions:
        known = ", ".join(sorted(map(str, champions), key=int)) or "none"
        raise ConfigError(
            f"{model} version {requested} never was champion ({known} were): promote it instead"
        )
    version = versions.get(model, requested)
    if RETIRED_TAG in version.tags:
        review = ReviewDecision.from_tag(version, RETIRED_TAG)
        by = f" by {review.by} ({review.why})" if review else ""
        raise ConfigError(f"{model} version {requested} was retired{by}: choose another --to")
    return requested


def _no_previous(model: str, champion: str | None) -> str:
    """Say that there is no champion before, and name a version that ``--to`` may go back to.

    Versions that a move by hand or a rollback skipped are not gone back to without ``--to``.
    """
    numbers = [entry.to_version for entry in ledger.entries(model) if entry.to_version]
    if to := last_active(model, [number for number in numbers if number != champion]):
        return (
            f"{model} has no champion before version {champion} to go back to, but version {to} "
            f"has been champion: give --to {to}"
        )
    return (
        f"{model} has no earlier champion to go back to: see `python -m registry.history`, or "
        "promote another version"
    )


def rollback(model: str, to: str, before: RegistryState, why: str, by: str) -> None:
    """Make the version ``to``, an earlier champion, the champion again.

    Raises:
        LedgerConflictError: another entry came first; no alias was moved.
    """
    verdict = "not judged again: it has been champion"
    append_and_apply(model, before, ledger.ROLLBACK, to, why, by, verdict)


def main(argv: Sequence[str]) -> int:
    parser = cli.parser(
        "registry.rollback",
        "Make the champion before, or VERSION, champion again. Later rollbacks skip the version "
        "that was rolled back.",
    )
    parser.add_argument("--to", metavar="VERSION", help="default: the champion before")
    parser.add_argument("--why", required=True, help="reason, for the ledger")
    parser.add_argument("--by", help="person for whom you act; recorded beside your account")
    parser.add_argument("--model", default=versions.MODEL, help="registered model")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    before = reconcile(args.model)
    to = choose_target(args.model, before, args.to)
    rollback(args.model, to, before, args.why, actor(args.by))
    print(before.describe_change(args.model, to))
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
