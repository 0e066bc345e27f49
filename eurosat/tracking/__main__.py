"""What runs on this machine have not told the tracking server yet: look at it, and send it."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from rich.progress import TaskID

from eurosat.runtime import cli, exit_codes, logs
from eurosat.runtime.progress import bar
from eurosat.tracking import journal_index, mlflow_client
from eurosat.tracking.journal import PREFIX, Journal, now_ms
from eurosat.tracking.uploader import upload_all


def unsent(references: Sequence[str] = ()) -> Iterator[tuple[Journal, bool]]:
    """The journals that hold something back, were refused something, or that nobody will end, and
    whether they are held.

    A journal that is held is written by a living process, which sends it too.
    """
    for directory in list(journal_index.all_journals()):
        if (journal := journal_index.try_open(directory)) is None:
            continue
        alive = not journal.acquire()
        abandoned = (
            not alive and not journal.get_meta("status") and not journal.get_meta("attached")
        )
        names = {journal.reference, journal.id, PREFIX + journal.id}
        held_back = abandoned or journal.backlog() or journal.refusals()
        if held_back and (not references or names & {*references}):
            yield journal, alive
        journal.close()


def status() -> int:
    """Print what waits; 1 where something does."""
    found = 0
    for journal, alive in unsent():
        found += 1
        minutes = (now_ms() - int(journal.get_meta("start_ms") or 0)) / 60e3
        state = "a process writes it" if alive else "its process has ended"
        if refused := journal.refusals():
            state += f", {_refused(refused)}"
        name = journal.get_meta("run_name") or "additions"
        print(
            f"{journal.reference}\t{name}\t{minutes:.0f} min\t{journal.backlog()}\t{state}\t"
            f"{mlflow_client.without_password(journal.get_meta('server') or '')}"
        )
    if not found:
        print("the tracking server has everything")
    return exit_codes.NEGATIVE if found else exit_codes.OK


def sync(references: Sequence[str]) -> int:
    """Send what waits, and once more what was refused; 1 where some of it could not be sent."""
    left, skipped, started = 0, 0, time.monotonic()
    with bar() as shown:
        for journal, alive in unsent(references):
            if alive:
                print(f"{journal.reference}: its process is alive and sends it itself")
                skipped += 1
                continue
            if journal.get_meta("status") is None and not journal.get_meta("attached"):
                _end(journal)
            journal.requeue_rejected()
            waiting = journal.backlog()
            task = shown.add_task(
                f"send {journal.get_meta('run_name') or journal.id}", total=None, note=str(waiting)
            )

            def told(task: TaskID = task, journal: Journal = journal) -> None:
                shown.update(task, note=f"{journal.backlog()} left")

            why = _delivered(journal, told)
            shown.remove_task(task)
            refused = journal.refusals()
            left += bool(why or refused)
            print(f"{journal.reference}: " + (f"not sent: {why}" if why else f"sent {waiting}"))
            if refused:
                print(f"  {_refused(refused)}; delete {journal.directory} to give that up")
            elif not why and journal.get_meta("status") in ("FINISHED", None):
                journal.remove()
    if not left and not skipped:
        said = "nothing of these waits here" if references else "the tracking server has everything"
        print(f"{said} ({time.monotonic() - started:.0f} s)")
    return exit_codes.NEGATIVE if left else exit_codes.OK


def _refused(refusals: Sequence[str]) -> str:
    return f"the server refused {len(refusals)}, the first: {refusals[0]}"


def _end(journal: Journal) -> None:
    """The last word of a run whose process left none here: KILLED, until somebody continues it.

    Where the disk had no room for it, the server was told FAILED at least.
    """
    if journal.run_id and journal.get_meta("opened"):
        with contextlib.suppress(Exception):  # whatever it is, `_delivered` tells it
            heard = mlflow_client.client(journal.get_meta("server")).get_run(journal.run_id)
            if heard.info.status == "FAILED":
                return journal.end("FAILED")
    journal.set_tags({"killed.why": "its process ended without a word"})
    return journal.end("KILLED")


def _delivered(journal: Journal, told: Callable[[], None]) -> str | None:
    try:
        client = mlflow_client.client(journal.get_meta("server"))
    except Exception as error:  # noqa: BLE001 - MLflow raises many kinds for a bad address
        return mlflow_client.first_line(error)
    return upload_all(journal, client, told)


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
    cli.run_command(main)
