"""A directive that lists every key of a settings class: type, limits, default, description."""

import dataclasses
import importlib
import json
import types
import typing
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from pydantic.fields import FieldInfo
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

LIMITS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
"""Limits of a number, by their names in pydantic, in words."""


def keys(settings: type, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield key, type with limits, default and description of each field, nested ones too."""
    hints = typing.get_type_hints(settings, include_extras=True)
    descriptions = ModuleAnalyzer.for_module(settings.__module__).find_attr_docs()
    for field in dataclasses.fields(settings):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from keys(typing.cast("type", hint), f"{prefix}{field.name}.")
        else:
            lines = descriptions.get((settings.__name__, field.name), [])
            required = field.default is dataclasses.MISSING
            default = "required" if required else f"``{_as_yaml(field.default)}``"
            yield f"``{prefix}{field.name}``", describe_type(hint), default, "\n".join(lines)


def describe_type(hint: Any) -> str:
    """Return a type as users write its values, such as "float, above 0"."""
    if typing.get_origin(hint) is typing.Annotated:
        base, *rest = typing.get_args(hint)
        return ", ".join([describe_type(base), *_limits(rest)])
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"``{value}``" for value in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(describe_type(part) for part in typing.get_args(hint))
    return "``null``" if hint is type(None) else str(hint.__name__)


def _limits(annotations: list[Any]) -> list[str]:
    metadata = [
        item for note in annotations if isinstance(note, FieldInfo) for item in note.metadata
    ]
    return [
        f"{words} {getattr(item, name):.10g}"
        for item in metadata
        for name, words in LIMITS.items()
        if hasattr(item, name)
    ]


def _as_yaml(value: object) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


class SettingsTable(SphinxDirective):
    """``{settings-table} MODULE.CLASS``: a table with a row for each key of the class."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].rpartition(".")
        settings = getattr(importlib.import_module(module), name)
        self.env.note_reread()  # the keys change with the code, not with this page
        lines = [".. list-table::", "   :header-rows: 1", "   :widths: 29 19 13 39", ""]
        for row in [("key", "value", "default", "meaning"), *keys(settings)]:
            first, *others = (cell.strip().replace("\n", "\n       ") for cell in row)
            lines += [f"   * - {first}", *(f"     - {cell}" for cell in others)]
        # descriptions are reStructuredText, as docstrings are
        return self.parse_text_to_nodes("\n".join(["```{eval-rst}", *lines, "```"]))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("settings-table", SettingsTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
