"""Settings as frozen pydantic dataclasses whose faults become one ConfigError of one line."""

import difflib
import functools
import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import field, fields
from typing import Any, TypeVar, cast

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from pydantic.dataclasses import dataclass

from eurosat.errors import ConfigError

if typing.TYPE_CHECKING:
    from pydantic_core import ErrorDetails

T = TypeVar("T")
STRICT = ConfigDict(extra="forbid", strict=True)
"""No unknown keys; no conversions but from int to float, so that a bool is not an int."""
TYPE_NAMES = {
    "bool_type": "bool",
    "dataclass_type": "a mapping",
    "float_type": "float",
    "int_type": "int",
    "list_type": "list",
    "string_type": "str",
}
"""What users call the type that a value of another type fails with."""
LIMITS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}
"""By type of error, the name of the limit and the words before its value."""


@typing.dataclass_transform(
    kw_only_default=True, frozen_default=True, field_specifiers=(field, Field)
)
def settings(path: str = "") -> Callable[[type[T]], type[T]]:
    """Return a decorator that makes a frozen, keyword-only dataclass whose values are checked.

    ``path`` is the key of the class in users' files, such as ``optim``: errors name its fields
    by it. A call with a value of the wrong type or out of range raises ConfigError.
    """

    def decorate(cls: type[T]) -> type[T]:
        made: Any = dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)(cls)
        validate = made.__init__

        @functools.wraps(validate)
        def checked_init(self: T, **values: Any) -> None:
            try:
                validate(self, **values)
            except ValidationError as error:
                raise ConfigError(_describe(made, error, path)) from None

        made.__init__ = checked_init
        return cast("type[T]", made)

    return decorate


def from_mapping(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Build a dataclass, and those nested in it, from mappings; integers pass for floats.

    ``cls`` is made by `settings`, or a dataclass of the standard library. ``path`` is the key of
    ``values`` in the user's file; errors name their keys by it.

    Raises:
        ConfigError: names every unknown key and every unfit value at once.
    """
    if "__pydantic_config__" not in vars(cls):
        with_config(STRICT)(cls)
    try:
        # As JSON: of Python's values, strict validation takes no mapping for a nested dataclass.
        return TypeAdapter(cls).validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise ConfigError(_describe(cls, error, path)) from None


def _describe(cls: type, error: ValidationError, path: str) -> str:
    """Return every fault in one line, unknown keys first: they explain the missing ones."""
    faults = error.errors(include_url=False)
    faults.sort(key=lambda fault: fault["type"] != "unexpected_keyword_argument")
    return "; ".join(_describe_fault(cls, fault, path) for fault in faults)


def _describe_fault(cls: type, fault: "ErrorDetails", path: str) -> str:
    kind, context = fault["type"], fault.get("ctx", {})
    key = ".".join(map(str, [*filter(None, [path]), *fault["loc"]]))
    if kind == "value_error":  # raised by __post_init__, whose messages name their keys
        return str(context["error"])
    if kind == "missing":
        return f"missing key {key}"
    if kind == "unexpected_keyword_argument":
        return f"unknown key {key}: {_suggest(cls, fault['loc'])}"
    if kind in LIMITS:
        name, words = LIMITS[kind]
        expected = f"{words} {context[name]:.10g}"
    else:
        expected = TYPE_NAMES.get(kind) or context.get("expected") or fault["msg"]
    return f"{key or 'the configuration'} must be {expected}; got {fault['input']!r}"


def _suggest(cls: type, location: tuple[int | str, ...]) -> str:
    """Return the known key next to an unknown one, or all known keys."""
    *sections, key = location
    for section in sections:
        cls = typing.get_type_hints(cls)[str(section)]
    known = [known.name for known in fields(cls)]
    close = difflib.get_close_matches(str(key), known, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
