"""One version: where it is from, what it stands for, what was said of it."""

from collections.abc import Sequence

from eurosat.runtime import cli, exit_codes, logs
from registry import history, ledger, tables, versions
from registry.reconcile import reconcile


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("registry.show", "Print a version's lineage, verdict and history.")
    parser.add_argument("version", metavar="VERSION")
    parser.add_argument("--model", default=versions.MODEL, help="registered model")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    from rich.table import Table

    reconcile(args.model)
    version = versions.named(args.model, args.version)
    number = str(version.version)
    aliases = [alias for alias in versions.ALIASES if versions.holds(args.model, alias, number)]
    table = Table("what", "value")
    facts = {"version": number, "aliases": ", ".join(aliases) or "-", "run": version.run_id or "-"}
    for name, value in (facts | dict(sorted(version.tags.items()))).items():
        table.add_row(name, value)
    tables.show(table)
    known = ledger.entries(args.model)
    touching = [entry for entry in known if number in (entry.from_version, entry.to_version)]
    if touching:
        history.show(touching)
    else:
        print(f"{args.model} version {number} was never champion")
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
