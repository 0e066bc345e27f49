"""The environment and the platform, looked at from the user's side: `python -m eurosat.doctor`.

Servers are asked by URL, as any client of theirs would ask.
"""
