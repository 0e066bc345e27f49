"""How a process of this project ends: exit codes, and one-line errors on standard error."""

import logging
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from eurosat.errors import EuroSATError
from eurosat.runtime import exit_codes, telemetry


def run(function: Callable[[], int]) -> NoReturn:
    """Exit with what ``function`` returns; errors of ours are one line and code 2."""
    telemetry.turn_off()  # before a library is imported that sends telemetry
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(exit_codes.TERMINATED)
    )  # runs end with their status
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
