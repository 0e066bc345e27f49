"""Files in folders and buckets."""
