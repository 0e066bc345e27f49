"""Labelled tiles: sources, decoding, the pack, duplicates and splits."""
