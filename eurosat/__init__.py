"""Train, evaluate and explain land-cover models of satellite tiles."""

import sys
from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"

REQUIRED_PACKAGE = "pydantic"
"""A package that every environment of this project has, those of the images too."""


def _require_environment() -> None:
    """End ``python -m ...`` in one line where Python lacks the project's packages.

    Every folder of commands imports this module first: a traceback would not name the remedy.
    """
    if "-m" not in sys.orig_argv or find_spec(REQUIRED_PACKAGE):
        return
    environment = Path(__file__).resolve().parents[1] / ".venv"
    is_ready = (environment / "product").exists()  # written by `make setup`
    steps = [*([] if is_ready else ["`make setup`"]), "`source .venv/bin/activate`"]
    print(
        f"error: {sys.executable} lacks this project's packages: run {' and '.join(steps)} in "
        f"{environment.parent}, then this command again",
        file=sys.stderr,
    )
    sys.exit(2)


_require_environment()
