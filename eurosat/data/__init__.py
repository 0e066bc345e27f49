"""Labelled tiles: found, read, checked, packed and split."""
