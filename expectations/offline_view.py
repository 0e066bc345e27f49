"""The page layout for Great Expectations' own pages. Great Expectations loads it by its name.

Its default layout loads styles and scripts from a dozen hosts. This one keeps the content and
needs nothing but the page itself, so that it opens on a machine without a network and in MLflow's
artifact viewer. Great Expectations writes strings of a table into the page as they are, so names of
tiles and folders are escaped before it sees them.
"""

import html
from pathlib import Path
from typing import Any

from great_expectations.render.view.view import DefaultJinjaPageView

from eurosat.runtime.templates import CONTENT_SECURITY_POLICY

TEMPLATES = Path(__file__).parent / "templates"


class OfflinePageView(DefaultJinjaPageView):
    """Render the sections of a page into ``great_expectations_page.html``."""

    _template = "great_expectations_page.html"

    def __init__(self, custom_styles_directory: str | None = None) -> None:
        super().__init__(custom_styles_directory, custom_views_directory=str(TEMPLATES))
        self.env.globals["content_security_policy"] = CONTENT_SECURITY_POLICY

    def render(self, document: Any, template: str | None = None, **kwargs: Any) -> Any:
        """Return the page of a document of Great Expectations, whose strings are text."""
        self._validate_document(document)
        template_page = self._get_template(template or self._template)
        return template_page.render(_escaped(document.to_json_dict()), **kwargs)


def _escaped(content: Any) -> Any:
    """Return the content with its strings escaped; Great Expectations escapes parameters itself."""
    if isinstance(content, str):
        return html.escape(content)
    if isinstance(content, list):
        return [_escaped(item) for item in content]
    if isinstance(content, dict):
        return {
            key: value if key == "params" else _escaped(value) for key, value in content.items()
        }
    return content
