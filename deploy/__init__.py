"""What is for servers and the cloud: images, backups."""
