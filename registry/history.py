"""Who made which version champion, when and why; and whether that can be relied on."""

from collections.abc import Sequence

from eurosat.runtime import cli, exit_codes, logs
from registry import ledger, tables, versions
from registry.reconcile import reconcile


def show(entries: Sequence[ledger.Entry]) -> None:
    from rich.table import Table

    table = Table("time (UTC)", "what", "by", "from", "to", "why", "verdict", "digest")
    for column in (*table.columns[:5], table.columns[-1]):
        column.no_wrap = True
    for entry in entries:
        cells = (entry.time[:19], entry.action, entry.actor)
        moved = (entry.from_version or "-", entry.to_version or "-")
        table.add_row(*cells, *moved, entry.why, entry.verdict, entry.digest[:12])
    tables.show(table)


def verify(model: str) -> list[str]:
    """What is wrong with the ledger; prints what is right."""
    records = ledger.records(model)
    links = ledger.chain(records)
    second, broken = ledger.outside(records)
    faults = [
        f"record {number} links to no entry: it, or the one before it, was changed or taken out"
        for number in broken
    ]
    held = versions.by_alias(model, versions.CHAMPION)
    champion = str(held.version) if held else None
    entered = links[-1].entry.to_version if links else None
    if champion != entered:
        faults.append(
            f"champion is version {champion or 'none'}, and the ledger says {entered or 'none'}: "
            "any command of `registry` completes or enters that"
        )
    print(
        f"{len(links)} entries link up from the first to {links[-1].entry.digest[:12]}"
        if links
        else "no entry links up"
    )
    if second:
        print(f"{len(second)} came second to another and never counted")
    return faults


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("registry.history", "Print who made which version champion, when and why.")
    parser.add_argument(
        "--verify", action="store_true", help="check the chain and the alias, and change nothing"
    )
    parser.add_argument("--model", default=versions.MODEL, help="registered model")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    if not args.verify:
        reconcile(args.model)
    known = ledger.entries(args.model)
    if known:
        show(known)
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
