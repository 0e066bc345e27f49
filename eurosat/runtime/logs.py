"""Logging to the console and into the run, in one format."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eurosat.errors import ConfigError

FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
LEVELS = ("debug", "info", "warning", "error")
NOISY_LOGGERS = (
    "alembic",
    "mlflow",
    "lightning.pytorch",
    "lightning.fabric",
    "great_expectations",
    "rasterio",
    "onnx_ir",
    "onnxscript",
    "torch",
    "matplotlib",
    "PIL",
    "urllib3",
    "h5py",
    "numexpr",
)


def setup(level: str = "info") -> None:
    """Log to standard error; libraries from ``warning`` up, unless ``level`` is debug."""
    if level not in LEVELS:
        raise ConfigError(f"log level {level!r} is not one of {', '.join(LEVELS)}")
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(logging.Formatter(FORMAT, "%H:%M:%S"))
    logging.basicConfig(level=level.upper(), handlers=[console], force=True)
    quiet_libraries()
    logging.captureWarnings(True)


def quiet_libraries() -> None:
    """Raise the level of noisy libraries; call it again after an import that sets its own level."""
    level = logging.getLogger().level
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(max(level, logging.WARNING) if level > 10 else level)
    if level > 10:  # it warns of each retry; we log the outcome
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


@contextmanager
def only_errors() -> Iterator[None]:
    """Silence everything below an error until the block ends."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def copied_to(file: Path) -> Iterator[Path]:
    """Write every log record to ``file`` too, until the block ends."""
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter(FORMAT))
    logging.getLogger().addHandler(handler)
    try:
        yield file
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
