"""Run a process: exit codes, and one-line errors on standard error."""

import logging
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from eurosat.errors import EuroSATError
from eurosat.runtime import exit_codes, telemetry


def run(function: Callable[[], int]) -> NoReturn:
    """Exit with the result of ``function``; an EuroSATError is one line and exit code 2."""
    telemetry.turn_off()  # before the import of any library that sends telemetry
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(exit_codes.TERMINATED)
    )  # lets open runs record their status
    try:
        sys.exit(function())
    except EuroSATError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(exit_codes.BAD_INPUT)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(exit_codes.INTERRUPTED)
    except Exception:
        logging.getLogger(__name__).exception("this is a bug: please report it")
        sys.exit(exit_codes.FAULT)
