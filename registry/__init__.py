"""Versions of the model: registered, judged, promoted and rolled back, with a ledger of changes."""
