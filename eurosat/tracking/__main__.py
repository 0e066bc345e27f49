"""List or send what the tracking server does not have yet of this machine's runs."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from eurosat.runtime import cli, exit_codes, logs
from eurosat.runtime.progress import bar
from eurosat.tracking import journal_index, mlflow_client
from eurosat.tracking.journal import PREFIX, Journal, now_ms
from eurosat.tracking.uploader import upload_all

ALL_SENT = "the tracking server has everything"


def unsent(references: Sequence[str] = ()) -> Iterator[tuple[Journal, bool]]:
    """Yield the journals with something to send, and whether a living process writes them.

    These have a backlog, or entries that the server refused, or a run that nobody will end. The
    process of a run sends its journal itself.
    """
    for directory in list(journal_index.all_journals()):
        if (journal := journal_index.try_open(directory)) is None:
            continue
        is_alive = not journal.acquire()
        is_unsent = journal.outbox.backlog() or journal.outbox.refusals()
        is_abandoned = not is_alive and not _has_ended(journal)
        names = {journal.reference, journal.id, PREFIX + journal.id}
        is_selected = not references or names & {*references}
        if is_selected and (is_unsent or is_abandoned):
            yield journal, is_alive
        journal.close()


def status() -> int:
    """Print a line for each journal with something to send; return NEGATIVE if there is one."""
    count = 0
    for journal, is_alive in unsent():
        count += 1
        minutes = (now_ms() - int(journal.get_meta("start_ms") or 0)) / 60e3
        state = "its process is writing it" if is_alive else "its process has ended"
        if refusals := journal.outbox.refusals():
            state += f", {_describe_refusals(refusals)}"
        name = journal.get_meta("run_name") or "additions"
        print(
            f"{journal.reference}\t{name}\t{minutes:.0f} min\t{journal.outbox.backlog()}\t{state}\t"
            f"{mlflow_client.without_password(journal.get_meta('server') or '')}"
        )
    if not count:
        print(ALL_SENT)
    return exit_codes.NEGATIVE if count else exit_codes.OK


def sync(references: Sequence[str], to: str | None = None) -> int:
    """Send everything, also what was refused before; return NEGATIVE if some could not be sent.

    ``to`` is the new address of a server that has moved: the journals send to it from now on.
    """
    num_failed, num_skipped, started = 0, 0, time.monotonic()
    for journal, is_alive in unsent(references):
        if is_alive:
            print(f"{journal.reference}: its process is running and sends it itself")
            num_skipped += 1
            continue
        if to:
            journal.set_meta(server=to)
        if not _send(journal):
            num_failed += 1
    if not num_failed and not num_skipped:
        seconds = time.monotonic() - started
        result = "nothing left to send of these runs" if references else ALL_SENT
        print(f"{result} ({seconds:.0f} s)")
    elif num_failed and not to:
        print("if the server has moved: `python -m eurosat.tracking sync --to URI`")
    return exit_codes.NEGATIVE if num_failed else exit_codes.OK


def _send(journal: Journal) -> bool:
    """Send one journal, with a progress bar, and print the result; False if some is left."""
    if not _has_ended(journal):
        _end_abandoned(journal)
    outbox = journal.outbox
    outbox.requeue_refused()
    backlog = outbox.backlog()
    with bar() as progress:
        name = journal.get_meta("run_name") or journal.id
        task = progress.add_task(f"send {name}", total=None, note=str(backlog))

        def show_backlog() -> None:
            progress.update(task, note=f"{outbox.backlog()} left")

        error = _upload(journal, show_backlog)
        progress.remove_task(task)
    print(f"{journal.reference}: " + (f"not sent: {error}" if error else f"sent {backlog}"))
    refusals = outbox.refusals()
    if refusals:
        print(f"  {_describe_refusals(refusals)}; to give that up, delete {journal.directory}")
    elif not error and journal.get_meta("status") in ("FINISHED", None):
        journal.remove()
    return not error and not refusals


def _upload(journal: Journal, on_progress: Callable[[], None]) -> str | None:
    """Send a journal to its server; return the reason if that failed, else None."""
    try:
        client = mlflow_client.client(journal.get_meta("server"))
    except Exception as error:  # noqa: BLE001 - MLflow raises many kinds for a bad address
        return mlflow_client.first_line(error)
    return upload_all(journal, client, on_progress)


def _has_ended(journal: Journal) -> bool:
    """Return whether the run has a final status, or another process ends it."""
    return bool(journal.get_meta("status") or journal.get_meta("attached"))


def _end_abandoned(journal: Journal) -> None:
    """End a run whose process died without a status: KILLED, until somebody continues it.

    It is FAILED if the server says so: a process without space on its disk ended it there.
    """
    status_on_server = None
    if journal.run_id and journal.get_meta("opened"):
        with contextlib.suppress(Exception):  # `_upload` will report what is wrong
            client = mlflow_client.client(journal.get_meta("server"))
            status_on_server = client.get_run(journal.run_id).info.status
    if status_on_server == "FAILED":
        journal.end("FAILED")
    else:
        journal.set_tags({"killed.why": "its process ended without a status"})
        journal.end("KILLED")


def _describe_refusals(refusals: Sequence[str]) -> str:
    return f"the server refused {len(refusals)}, the first: {refusals[0]}"


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("eurosat.tracking", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("status", help="list the runs that the server does not have in full")
    sync_parser = commands.add_parser("sync", help="send what the server does not have")
    sync_parser.add_argument("runs", nargs="*", help="only these runs: ids or journal:ID")
    sync_parser.add_argument(
        "--to", metavar="URI", help="address of the tracking server, if it has moved since"
    )
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    return status() if args.command == "status" else sync(args.runs, args.to)


if __name__ == "__main__":
    cli.run_command(main)
