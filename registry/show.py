"""Print one version: its run, tags and aliases, and its part of the history."""

import re
from collections.abc import Sequence

from eurosat.models.version_files import FILES_TAG
from eurosat.runtime import cli, exit_codes, logs, tables
from registry import history, ledger, versions
from registry.reconcile import reconcile

DIGEST = re.compile(r"[0-9a-f]{40}(-dirty)?|[0-9a-f]{64}")
SHORT_DIGEST = 12


def _shorten(name: str, value: str) -> str:
    """Return the first characters of a digest, and the number of files instead of their digests."""
    if name == FILES_TAG:
        return f"{value.count('[')} files"
    return value[:SHORT_DIGEST] if DIGEST.fullmatch(value) else value


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("registry.show", "Print a version's run, tags, aliases and history.")
    parser.add_argument("version", metavar="VERSION", help="number or alias, such as champion")
    parser.add_argument("--full", action="store_true", help="print complete digests and verdicts")
    parser.add_argument("--model", default=versions.MODEL, help="registered model")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    from rich.table import Table

    reconcile(args.model)
    version = versions.from_argument(args.model, args.version)
    number = str(version.version)
    aliases = [alias for alias in versions.ALIASES if versions.has_alias(args.model, alias, number)]
    table = Table("name", "value")
    properties = {
        "version": number,
        "aliases": ", ".join(aliases) or "-",
        "run": version.run_id or "-",
        **{
            name: value if args.full else _shorten(name, value)
            for name, value in sorted(version.tags.items())
        },
    }
    for name, value in properties.items():
        table.add_row(name, value)
    tables.print_table(table)
    entries = [
        entry
        for entry in ledger.entries(args.model)
        if number in (entry.from_version, entry.to_version)
    ]
    if entries:
        history.print_entries(entries, full=args.full)
    else:
        print(f"{args.model} version {number} was never champion")
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
