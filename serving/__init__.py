"""The model in production."""

import eurosat  # noqa: F401 - first: it names what to do where packages are missing
