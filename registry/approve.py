"""Say that a version may become champion, or that it may not; gates.toml says who is asked."""

from collections.abc import Sequence

from eurosat.runtime import cli, exit_codes, logs
from registry import approvals, versions


def main(argv: Sequence[str]) -> int:
    parser = cli.parser(
        "registry.approve",
        "Approve VERSION, or reject it, for the gate `approval`; `registry.promote` goes on then, "
        "or the receiver by itself.",
    )
    parser.add_argument("version", metavar="VERSION")
    parser.add_argument("--why", required=True)
    parser.add_argument("--by", help="who says so; default: the user")
    parser.add_argument("--reject", action="store_true")
    parser.add_argument("--model", default=versions.MODEL, help="registered model")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    number = str(versions.named(args.model, args.version).version)
    word = approvals.REJECTED if args.reject else approvals.APPROVED
    said = approvals.say(args.model, number, approvals.APPROVAL, word, args.why, args.by)
    print(f"{args.model} version {number} is {said.word} by {said.by}")
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
