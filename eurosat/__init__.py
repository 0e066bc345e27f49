"""Labelled satellite tiles in; models, numbers and maps out."""

__version__ = "0.1.0"
