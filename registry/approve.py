"""Approve or reject a version, for the gate `approval`."""

from collections.abc import Sequence

from eurosat.runtime import cli, exit_codes, logs
from registry import approvals, versions


def main(argv: Sequence[str]) -> int:
    parser = cli.parser(
        "registry.approve",
        "Approve or reject VERSION for the gate `approval`. Then run `registry.promote`; a running "
        "`registry.receiver` judges the version again by itself.",
    )
    parser.add_argument("version", metavar="VERSION")
    parser.add_argument("--why", required=True, help="reason, stored with the version")
    parser.add_argument("--by", help="person for whom you act; recorded beside your account")
    parser.add_argument("--reject", action="store_true", help="reject instead of approve")
    parser.add_argument("--model", default=versions.MODEL, help="registered model")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    number = str(versions.from_argument(args.model, args.version).version)
    decision = approvals.REJECTED if args.reject else approvals.APPROVED
    review = approvals.record(
        args.model, number, approvals.APPROVAL_TAG, decision, args.why, args.by
    )
    print(f"{args.model} version {number} is {review.decision} by {review.by}")
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
