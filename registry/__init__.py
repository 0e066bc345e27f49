"""Versions of the model: registered, judged, promoted and rolled back, with a ledger of changes."""

import eurosat  # noqa: F401 - first: it names what to do where packages are missing
