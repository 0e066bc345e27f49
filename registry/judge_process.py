"""Judge a version in a process of its own, with limits of memory and time.

The promoter reads files that others wrote. One that takes too much ends this process, not the
promoter.
"""

import multiprocessing
import resource
from multiprocessing.connection import Connection
from pathlib import Path

from eurosat.errors import EuroSATError
from eurosat.runtime import worker_processes
from registry import gates, judge, versions
from registry.verdict import Verdict

PRELOAD = ("mlflow", "pandas", "pyarrow.parquet", "registry.judge")
"""Imported once, by the process from which those that judge are forked."""
MAX_MEMORY_MB = 1024
"""Private memory that judging may take; the promoter's container has 1500 MB."""
MAX_SECONDS = 600.0
MAX_MESSAGE = 500
"""Characters of an unexpected error that are handed on."""


class JudgementFailed(EuroSATError):
    """A version could not be judged within the limits."""


def judge_apart(model: str, number: str, champion: str | None, gates_file: Path) -> Verdict:
    """Judge a version against the champion, as `registry.judge.judge_version` does.

    Raises:
        JudgementFailed: it took too much memory or time, or failed in an unexpected way.
        EuroSATError: it cannot be judged.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    arguments = (sender, MAX_MEMORY_MB, model, number, champion, gates_file)
    process = worker_processes.create(_judge, arguments, name=f"judge-{number}", preload=PRELOAD)
    process.start()
    sender.close()
    try:
        if not receiver.poll(MAX_SECONDS):
            raise JudgementFailed(f"judging version {number} took over {MAX_SECONDS:g} s")
        result = receiver.recv()
    except EOFError:
        process.join()
        raise JudgementFailed(
            f"judging version {number} ended with exit code {process.exitcode}: its files may take "
            f"over {MAX_MEMORY_MB} MB of memory"
        ) from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if isinstance(result, Verdict):
        return result
    assert isinstance(result, EuroSATError)
    raise result


def _judge(
    sender: Connection,
    max_memory_mb: int,
    model: str,
    number: str,
    champion: str | None,
    gates_file: Path,
) -> None:
    """Send the verdict, or the error, of a version."""
    limit = (_private_mb() + max_memory_mb) * 1_000_000
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    result: Verdict | EuroSATError
    try:
        result = judge.judge_version(
            versions.get(model, number),
            versions.get(model, champion) if champion else None,
            gates.load(gates_file),
        )
    except EuroSATError as error:
        result = type(error)(str(error))
    except MemoryError:
        result = JudgementFailed(
            f"judging version {number} takes over {max_memory_mb} MB of memory: its files are too "
            "large"
        )
    except Exception as error:  # noqa: BLE001 - the boundary of the process
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_MESSAGE]
        result = JudgementFailed(f"judging version {number} failed: {reason}")
    sender.send(result)
    sender.close()


def _private_mb() -> int:
    """Return the private memory that this process may write, in MB, as RLIMIT_DATA counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) // 1000
    return 0
