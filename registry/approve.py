"""Say that a version may become champion, or that it may not; gates.toml says who is asked."""

from collections.abc import Sequence

from eurosat import cli, logs
from registry import opinions, versions


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
    word = opinions.REJECTED if args.reject else opinions.APPROVED
    said = opinions.say(args.model, number, opinions.APPROVAL, word, args.why, args.by)
    print(f"{args.model} version {number} is {said.word} by {said.by}")
    return cli.OK


if __name__ == "__main__":
    cli.finish(main)
