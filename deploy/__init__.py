"""For servers and the cloud: the platform, its images, secrets, users and backups."""

import eurosat  # noqa: F401 - first: it names what to do where packages are missing
