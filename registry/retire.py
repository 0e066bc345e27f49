"""Take a version out of service: it challenges nobody, and no rollback goes back to it."""

from collections.abc import Sequence

from eurosat import cli, logs, tracking
from eurosat.errors import ConfigError
from registry import opinions, versions
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
    said = opinions.say(args.model, number, opinions.RETIRED, "retired", args.why, args.by)
    if versions.holds(args.model, versions.CHALLENGER, number):
        with tracking.explained(f"alias {versions.CHALLENGER}"):
            versions.client().delete_registered_model_alias(args.model, versions.CHALLENGER)
    reconcile(args.model)  # the one to go back to may be another now
    print(f"{args.model} version {number} is retired by {said.by}")
    return cli.OK


if __name__ == "__main__":
    cli.finish(main)
