"""Take a version out of service: it cannot be promoted, and rollbacks skip it."""

from collections.abc import Sequence

from eurosat import tracking
from eurosat.errors import ConfigError
from eurosat.runtime import cli, exit_codes, logs
from registry import approvals, versions
from registry.reconcile import reconcile


def main(argv: Sequence[str]) -> int:
    parser = cli.parser(
        "registry.retire",
        "Take VERSION out of service: it cannot be promoted, and rollbacks skip it. The champion "
        "cannot be retired.",
    )
    parser.add_argument("version", metavar="VERSION")
    parser.add_argument("--why", required=True, help="reason, stored with the version")
    parser.add_argument("--by", help="person for whom you act; recorded beside your account")
    parser.add_argument("--model", default=versions.MODEL, help="registered model")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    number = str(versions.from_argument(args.model, args.version).version)
    reconcile(args.model)
    if versions.has_alias(args.model, versions.CHAMPION, number):
        raise ConfigError(
            f"{args.model} version {number} is the champion: roll back, or promote another, first"
        )
    review = approvals.record(
        args.model, number, approvals.RETIRED_TAG, approvals.RETIRED, args.why, args.by
    )
    if versions.has_alias(args.model, versions.CHALLENGER, number):
        with tracking.translate_errors(f"alias {versions.CHALLENGER}"):
            versions.client().delete_registered_model_alias(args.model, versions.CHALLENGER)
    reconcile(args.model)  # `previous` may have to move to another version
    print(f"{args.model} version {number} is retired by {review.by}")
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
