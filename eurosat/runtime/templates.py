"""Fill in Jinja2 templates: pages in HTML, cards and reports in Markdown.

Names of folders, tiles, runs and classes come from whoever made them, so no value becomes markup:
in pages every value is escaped, in Markdown those with the filter ``text``. Pages also carry a
content security policy, under which nothing that they hold can run or load anything.
"""

import re
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment

CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
MARKDOWN = re.compile(r"[\\<>|\[\]]|\s+")
"""What begins a tag, a link, an image or a cell in Markdown; a line end may begin anything."""


def render(package: str, template: str, **values: object) -> str:
    """Return the text of a template in the folder ``templates`` of a package.

    Raises:
        jinja2.UndefinedError: the template uses a value that is not given.
    """
    return _environment(package).get_template(template).render(**values)


def markdown_text(value: object) -> str:
    """Return a value as Markdown that shows it in one line, whatever it holds."""
    entities = {"<": "&lt;", ">": "&gt;"}

    def escape(match: "re.Match[str]") -> str:
        found = match[0]
        return " " if found.isspace() else entities.get(found, f"\\{found}")

    return MARKDOWN.sub(escape, str(value))


@cache
def _environment(package: str) -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader(package),
        autoescape=select_autoescape(enabled_extensions=("html", "html.j2")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["text"] = markdown_text
    environment.globals["content_security_policy"] = CONTENT_SECURITY_POLICY
    return environment
