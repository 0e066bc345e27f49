"""Evaluate trained networks: metrics, calibration, robustness, plots and explanations."""
