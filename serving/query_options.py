"""The options of a prediction in the query string of a request."""

import difflib
import re
from collections.abc import Mapping
from typing import Any

from serving.errors import RequestRejected

OPTIONS = ("top_k", "tta", "explain")
OPTIONS_USAGE = "the options are top_k=NUMBER, tta=true|false and explain=true|false"
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
WORD = re.compile(r"\w{1,16}", re.ASCII)


def parse(query: Mapping[str, str]) -> dict[str, Any]:
    """Return the options of a prediction in the query string.

    Raises:
        RequestRejected: an option is unknown, or its value is malformed (422).
    """
    options: dict[str, Any] = {}
    for name, text in query.items():
        if name == "top_k" and text.isascii() and text.isdecimal() and len(text) < 10:
            options[name] = int(text)
        elif name in OPTIONS[1:] and text.lower() in BOOLEANS:
            options[name] = BOOLEANS[text.lower()]
        elif name in OPTIONS:
            raise RequestRejected(422, f"{name} has a malformed value: {OPTIONS_USAGE}")
        else:
            raise RequestRejected(422, _unknown_option(name))
    return options


def _unknown_option(name: str) -> str:
    """Return the error; it repeats the name only if that is close to a known one."""
    if WORD.fullmatch(name) and (similar := difflib.get_close_matches(name, OPTIONS, 1)):
        return f"unknown option {name}, did you mean {similar[0]}? {OPTIONS_USAGE}"
    return f"unknown option: {OPTIONS_USAGE}"
