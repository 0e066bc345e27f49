"""bench-serving: one tile a request, ours and its peers. Run by `python -m benchmarks.serving`."""
