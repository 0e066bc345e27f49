"""The page layout for Great Expectations' own pages. Great Expectations loads it by its name.

Its default layout loads styles and scripts from a dozen hosts. This one keeps the content and
needs nothing but the page itself, so that it opens on a machine without a network and in MLflow's
artifact viewer.
"""

from pathlib import Path

from great_expectations.render.view.view import DefaultJinjaPageView

TEMPLATES = Path(__file__).parent / "templates"


class OfflinePageView(DefaultJinjaPageView):
    """Render the sections of a page into ``great_expectations_page.html``."""

    _template = "great_expectations_page.html"

    def __init__(self, custom_styles_directory: str | None = None) -> None:
        super().__init__(custom_styles_directory, custom_views_directory=str(TEMPLATES))
