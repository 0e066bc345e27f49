"""Great Expectations suites over a table of tiles, and the command that runs them."""
