"""The documentation as a site: `make docs` builds it with Sphinx into build/docs."""

import sys
import tomllib
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS / "extensions")]

project = "EuroSAT"
author = "The EuroSAT platform maintainers"
release = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "command_help"]
exclude_patterns = ["notebooks", "extensions"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4

autodoc_default_options = {"members": True, "undoc-members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # those of other libraries are not written for Sphinx
default_role = "py:obj"

nitpicky = True
LIBRARIES = "collections|pathlib|types|typing|numpy|np|npt|pandas|pd|torch|lightning|optuna|ray"
LIBRARIES += "|mlflow|matplotlib|great_expectations|starlette|uvicorn|requests|onnx|onnxruntime"
nitpick_ignore_regex = [
    # Types of other libraries: their references are on servers that a build does not call.
    ("py:.*", rf"({LIBRARIES})\..*"),
    # A name in single backticks is linked if the reference has it, and code otherwise.
    ("py:obj", ".*"),
]
suppress_warnings = ["toc.empty_glob"]  # explanation/index.md names pages that may be missing

html_theme = "pydata_sphinx_theme"
html_title = f"EuroSAT {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "logo": {"text": html_title},
    "navbar_align": "left",
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "footer_start": [],
    "footer_end": ["sphinx-version"],
}


def keep_colon(
    app: Sphinx, what: str, name: str, item: object, options: object, lines: list[str]
) -> None:
    """Let napoleon read no type before the first colon of an attribute's docstring."""
    if what in ("attribute", "data") and lines:
        lines.insert(0, "")


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", keep_colon, priority=400)  # napoleon has 500
