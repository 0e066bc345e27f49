"""Fixtures of the platform's tests."""

from collections.abc import Iterator

import pytest

from tests.support import platforms


@pytest.fixture(scope="package")
def platform(isolated: None) -> Iterator[platforms.Platform]:
    """A running `make platform`, which the tests of this folder share."""
    with platforms.platform_folder() as folder:
        yield platforms.start_platform(folder)
