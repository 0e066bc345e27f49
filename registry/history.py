"""Print who made which version champion, when and why; and verify the ledger."""

from collections.abc import Sequence

from eurosat.runtime import cli, exit_codes, logs, tables
from registry import ledger, versions
from registry.reconcile import reconcile


def print_entries(entries: Sequence[ledger.LedgerEntry], *, full: bool = False) -> None:
    """Print a line per entry; with ``full`` also its whole reason, verdict and digest."""
    from rich.table import Table

    table = Table("time (UTC)", "action", "by", "from", "to", "why")
    for column in table.columns:
        column.no_wrap, column.overflow = True, "ellipsis"
    for entry in entries:
        action = (entry.time[:19], entry.action, entry.actor)
        table.add_row(*action, entry.from_version or "-", entry.to_version or "-", entry.why)
    tables.print_table(table)
    if full:
        for entry in entries:
            print(f"\n{entry.time[:19]} {entry.action} to version {entry.to_version or '-'}")
            print(f"why: {entry.why}\nverdict: {entry.verdict}\ndigest: {entry.digest}")


def verify(model: str) -> list[str]:
    """Print what is right with the ledger, and return what is wrong."""
    records = ledger.records(model)
    links = ledger.chain(records)
    second, broken = ledger.find_unlinked(records)
    faults = [
        f"record {number} links to no entry: it, or the one before it, was changed or deleted"
        for number in broken
    ]
    version = versions.by_alias(model, versions.CHAMPION)
    champion = str(version.version) if version else None
    entered = links[-1].entry.to_version if links else None
    if champion != entered:
        faults.append(
            f"champion is version {champion or 'none'}, but the ledger says {entered or 'none'}: "
            "run `python -m registry.history`, which records the change"
        )
    if links:
        print(f"{len(links)} entries link up from the first to {links[-1].entry.digest[:12]}")
    else:
        print("the ledger has no entries")
    if second:
        print(f"{len(second)} entries lost against one written at the same time, and do not count")
    return faults


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("registry.history", "Print who made which version champion, when and why.")
    parser.add_argument(
        "--verify", action="store_true", help="check the chain and the alias; change nothing"
    )
    parser.add_argument("--full", action="store_true", help="print verdicts and digests too")
    parser.add_argument("--model", default=versions.MODEL, help="registered model")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    if not args.verify:
        reconcile(args.model)
    entries = ledger.entries(args.model)
    if entries:
        print_entries(entries, full=args.full)
    else:
        print(f"the ledger of {args.model} is empty: nothing was promoted yet")
    if not args.verify:
        return exit_codes.OK
    faults = verify(args.model)
    for fault in faults:
        print(f"wrong: {fault}")
    return exit_codes.NEGATIVE if faults else exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
