"""Great Expectations suites over a table of tiles, and the command that runs them."""

import eurosat  # noqa: F401 - first: it names what to do where packages are missing
