"""Give the champion's place back to one that has held it."""

from collections.abc import Sequence

from eurosat import tracking
from eurosat.errors import ConfigError, TrackingError
from eurosat.runtime import cli, exit_codes, logs
from registry import ledger, versions
from registry.approvals import RETIRED, Opinion
from registry.reconcile import Standing, enter, last_kept, reconcile


def target(model: str, standing: Standing, asked: str | None) -> str:
    """The version to go back to: the one asked for, or the champion before.

    Raises:
        ConfigError: the one asked for never was champion, or is it now.
        TrackingError: there is none to go back to, or it was deleted.
    """
    entered = {entry.to_version for entry in ledger.entries(model)} - {None}
    if asked is None:
        found = last_kept(model, standing.before)
        if found is None:
            raise TrackingError(
                f"{model} has no earlier champion to go back to: see `python -m registry.history`"
            )
        return found
    if standing.number == asked:
        raise ConfigError(f"{model} version {asked} is the champion now: say another --to")
    if asked not in entered:
        known = ", ".join(sorted(map(str, entered), key=int)) or "none"
        raise ConfigError(
            f"{model} version {asked} never was champion ({known} were): promote it instead"
        )
    if RETIRED in (version := versions.get(model, asked)).tags:
        said = Opinion.of(version, RETIRED)
        by = f" by {said.by} ({said.why})" if said else ""
        raise ConfigError(f"{model} version {asked} was retired{by}: say another --to")
    return asked


def rollback(model: str, to: str, before: Standing, why: str, actor: str) -> None:
    """Make a version that has been champion the champion again.

    Raises:
        LedgerConflictError: another entry came first; no alias was moved.
    """
    verdict = "not judged again: it has been champion"
    enter(model, before, ledger.ROLLBACK, to, why, actor, verdict)


def main(argv: Sequence[str]) -> int:
    parser = cli.parser(
        "registry.rollback",
        "Make the champion before, or VERSION, champion again; the one that is rolled away is not "
        "gone back to.",
    )
    parser.add_argument("--to", metavar="VERSION", help="default: the champion before")
    parser.add_argument("--why", required=True, help="entered in the ledger")
    parser.add_argument("--by", help="who rolls back; default: the user")
    parser.add_argument("--model", default=versions.MODEL, help="registered model")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    before = reconcile(args.model)
    to = target(args.model, before, args.to)
    rollback(args.model, to, before, args.why, args.by or tracking.user())
    print(before.followed_by(args.model, to))
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
