"""Build, load, run and export networks."""
