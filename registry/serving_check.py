"""Ask a serving process whether it answers with a version."""

import os
from typing import Any

import requests

from registry.notifications import redact

REJECTED_BY_SERVER, NOT_LOADED = "the server refused it: ", "not loaded in time: "
"""How the faults begin that are the model's, so that it is rolled back."""
SERVING_KEY = "EUROSAT_SERVING_KEY"
"""Environment variable of the key for the serving process, if that requires one."""
REQUEST_TIMEOUT_S = 5


def serving_fault(url: str, model: str, number: str) -> str:
    """Return why the server does not answer with the version, or an empty string."""
    key = os.environ.get(SERVING_KEY)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        response = requests.get(
            f"{url.rstrip('/')}/model", headers=headers, timeout=REQUEST_TIMEOUT_S
        )
        status: Any = response.json() if response.ok else {}
    except (requests.RequestException, ValueError) as error:
        return f"{redact(url)} does not answer: {type(error).__name__}"
    if not response.ok or not isinstance(status, dict):
        return f"{redact(url)}/model answers with status {response.status_code}"
    if status.get("model_version") == number:
        return ""
    if reason := status.get("refused", {}).get(f"models:/{model}/{number}"):
        return f"{REJECTED_BY_SERVER}{reason}"
    return f"{NOT_LOADED}{redact(url)} still answers with {status.get('model_version')}"
