"""Checks of the environment and the platform from the user's side: `python -m eurosat.doctor`.

Servers are contacted by URL, as any client of theirs would do it.
"""
