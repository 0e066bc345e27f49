"""Errors that a command reports in one line, with exit code 2."""


class EuroSATError(Exception):
    """Base class. The message names the value, the limit and the remedy, in one line."""


class ConfigError(EuroSATError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""


class DataError(EuroSATError, ValueError):
    """Tiles, a pack or a validation record cannot be used."""


class ModelError(EuroSATError, ValueError):
    """Weights or a network cannot be used."""


class TrackingError(EuroSATError):
    """The tracking server, a run or an artifact cannot be reached."""


class StorageError(EuroSATError):
    """A folder or bucket cannot be reached, read or written."""


class NonFiniteLoss(EuroSATError, ArithmeticError):
    """Training diverged: the loss is NaN or infinite."""
