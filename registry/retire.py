"""Take a version out of service: it challenges nobody, and no rollback goes back to it."""

from collections.abc import Sequence

from eurosat import tracking
from eurosat.errors import ConfigError
from eurosat.runtime import cli, exit_codes, logs
from registry import approvals, versions
from registry.reconcile import reconcile


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("registry.retire", "Take VERSION out of service; the champion cannot be.")
    parser.add_argument("version", metavar="VERSION")
    parser.add_argument("--why", required=True)
    parser.add_argument("--by", help="who does it; default: the user")
    parser.add_argument("--model", default=versions.MODEL, help="registered model")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    number = str(versions.named(args.model, args.version).version)
    reconcile(args.model)
    if versions.holds(args.model, versions.CHAMPION, number):
        raise ConfigError(
            f"{args.model} version {number} is the champion: roll back, or promote another, first"
        )
    said = approvals.say(args.model, number, approvals.RETIRED, "retired", args.why, args.by)
    if versions.holds(args.model, versions.CHALLENGER, number):
        with tracking.translate_errors(f"alias {versions.CHALLENGER}"):
            versions.client().delete_registered_model_alias(args.model, versions.CHALLENGER)
    reconcile(args.model)  # the one to go back to may be another now
    print(f"{args.model} version {number} is retired by {said.by}")
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
