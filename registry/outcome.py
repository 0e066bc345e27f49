"""What became of a version that was registered: promoted, refused, or not judged yet."""

import logging
import os
import time

from eurosat import tracking
from registry import versions

log = logging.getLogger(__name__)

PROMOTER_VARIABLE = "EUROSAT_PROMOTER_URL"
"""Set where a promoter runs (`.platform/env`)."""
WAIT_S = 20.0
"""How long to wait for the promoter, which judges a version in about four seconds."""
POLL_INTERVAL_S = 0.5


def report(model: str, number: str) -> None:
    """Log what the gates decided; wait for a promoter if one judges the version."""
    deadline = time.monotonic() + WAIT_S
    while True:
        verdict = versions.get(model, number).tags.get(versions.VERDICT_TAG, "")
        is_champion = versions.has_alias(model, versions.CHAMPION, number)
        is_challenger = versions.has_alias(model, versions.CHALLENGER, number)
        is_decided = is_champion or verdict.startswith("refused") or (verdict and is_challenger)
        is_awaited = PROMOTER_VARIABLE in os.environ or (tracking.account() and not is_challenger)
        if is_decided or not is_awaited or time.monotonic() > deadline:
            break
        time.sleep(POLL_INTERVAL_S)
    name = f"{model} version {number}"
    if is_champion:
        log.info("%s is the champion", name)
    elif verdict.startswith("refused"):
        log.warning("%s was refused by the gates and is not served: %s", name, verdict)
    elif verdict:
        log.info("%s passed the gates; `registry.promote %s` makes it champion", name, number)
    else:
        log.info(
            "%s is not judged yet: `python -m registry.promote %s` judges it, and "
            "`python -m registry.show %s` prints the verdict of the promoter",
            name,
            number,
            number,
        )
