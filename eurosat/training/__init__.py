"""Fitting a network to the training fold."""
