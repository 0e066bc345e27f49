"""Print one version: its run, tags and aliases, and its part of the history."""

from collections.abc import Sequence

from eurosat.runtime import cli, exit_codes, logs, tables
from registry import history, ledger, versions
from registry.reconcile import reconcile


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("registry.show", "Print a version's run, tags, aliases and history.")
    parser.add_argument("version", metavar="VERSION")
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
        **dict(sorted(version.tags.items())),
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
        history.print_entries(entries)
    else:
        print(f"{args.model} version {number} was never champion")
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
