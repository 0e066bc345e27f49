"""Great Expectations suites over a per-tile table, and the verb that runs them."""
