"""Compatibility with versions that an earlier release registered.

Each version carries the `serving/pyfunc.py` of its day, whose methods, fields and configuration had
other names. Its predictions stay as they were when it was registered: the keys ``unlike_training``
and ``unlike_score`` are today's ``out_of_distribution`` and ``ood_score``.
"""

import sys
from collections.abc import Mapping
from typing import Any

MEMBERS = {
    "pending_tile": "job",
    "parse_options": "wish",
    "max_tiles_per_batch": "most",
    "run_batch": "answer",
    "precision": "form",
    "default_views": "judged_views",
}
"""Member of `serving.pyfunc.TileClassifier` -> its earlier name."""
CONFIG_KEYS = {"precision": "form"}
"""Key of ``model_config`` -> its earlier name."""


def adapt(classifier: Any) -> Any:
    """Return the classifier of a version, with today's names added where it has earlier ones."""
    if hasattr(classifier, "run_batch"):
        return classifier
    for name, earlier in MEMBERS.items():
        setattr(classifier, name, getattr(classifier, earlier))
    pending_tile = sys.modules[type(classifier).__module__].Job
    pending_tile.options = pending_tile.wish
    return classifier


def model_config(config: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config`` by the names of the keys that a version was ``saved`` with."""
    if "precision" in saved:
        return dict(config)
    return {CONFIG_KEYS.get(key, key): value for key, value in config.items()}
