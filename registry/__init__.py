"""Versions of the model: registered, judged, promoted, and who did it."""
