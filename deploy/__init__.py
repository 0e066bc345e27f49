"""For servers and the cloud: the platform, its images, secrets, users and backups."""
