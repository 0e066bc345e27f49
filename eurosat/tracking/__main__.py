"""What runs on this machine have not told the tracking server yet: look at it, and send it."""

import time
from collections.abc import Callable, Iterator, Sequence

from rich.progress import TaskID

from eurosat import cli, logs
from eurosat.progress import bar
from eurosat.tracking import journals, store
from eurosat.tracking.delivery import deliver
from eurosat.tracking.journal import PREFIX, Journal, now_ms


def unsent(references: Sequence[str] = ()) -> Iterator[tuple[Journal, bool]]:
    """The journals that hold something back, or that nobody will end, and whether they are held.

    A journal that is held is written by a living process, which sends it too.
    """
    for directory in list(journals.all_journals()):
        if (journal := journals.opened(directory)) is None:
            continue
        alive = not journal.hold()
        abandoned = not alive and not journal.about("status") and not journal.about("attached")
        names = {journal.reference, journal.id, PREFIX + journal.id}
        if (not references or names & {*references}) and (journal.waiting() or abandoned):
            yield journal, alive
        journal.close()


def status() -> int:
    """Print what waits; 1 where something does."""
    found = 0
    for journal, alive in unsent():
        found += 1
        minutes = (now_ms() - int(journal.about("start_ms") or 0)) / 60e3
        state = "a process writes it" if alive else "its process has ended"
        print(
            f"{journal.reference}\t{journal.about('run_name') or 'additions'}\t{minutes:.0f} min\t"
            f"{journal.waiting()}\t{state}\t"
            f"{store.without_password(journal.about('server') or '')}"
        )
    if not found:
        print("the tracking server has everything")
    return cli.NEGATIVE if found else cli.OK


def sync(references: Sequence[str]) -> int:
    """Send what waits; 1 where some of it could not be sent."""
    left, started = 0, time.monotonic()
    with bar() as shown:
        for journal, alive in unsent(references):
            if alive:
                print(f"{journal.reference}: its process is alive and sends it itself")
                continue
            if journal.about("status") is None and not journal.about("attached"):
                journal.set_tags({"killed.why": "its process ended without a word"})
                journal.end("KILLED")  # until somebody continues it
            waiting = journal.waiting()
            task = shown.add_task(
                f"send {journal.about('run_name') or journal.id}", total=None, note=str(waiting)
            )

            def told(task: TaskID = task, journal: Journal = journal) -> None:
                shown.update(task, note=f"{journal.waiting()} left")

            why = _delivered(journal, told)
            shown.remove_task(task)
            left += bool(why)
            print(f"{journal.reference}: " + (f"not sent: {why}" if why else f"sent {waiting}"))
            if not why and journal.about("status") in ("FINISHED", None):
                journal.remove()
    if not left:
        print(f"the tracking server has everything ({time.monotonic() - started:.0f} s)")
    return cli.NEGATIVE if left else cli.OK


def _delivered(journal: Journal, told: Callable[[], None]) -> str | None:
    try:
        client = store.client(journal.about("server"))
    except Exception as error:  # noqa: BLE001 - MLflow raises many kinds for a bad address
        return store.first_line(error)
    return deliver(journal, client, told)


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("eurosat.tracking", __doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("status", help="list the runs that the server does not have in full")
    sending = verbs.add_parser("sync", help="send what the server does not have")
    sending.add_argument("runs", nargs="*", help="only these: ids, or journal:ID")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    return status() if args.verb == "status" else sync(args.runs)


if __name__ == "__main__":
    cli.finish(main)
