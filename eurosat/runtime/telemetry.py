"""Turn off the usage data that libraries send."""

import os

OFF = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GX_ANALYTICS_ENABLED": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9",  # Ray would report that reporting is off
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # one bar for every small file
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # standard output belongs to the command
}


def turn_off() -> None:
    """Set the variables of `OFF` that the environment does not set itself."""
    for name, value in OFF.items():
        os.environ.setdefault(name, value)
