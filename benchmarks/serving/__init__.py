"""bench-serving: our server and its peers, with one tile per request; see `__main__`."""
