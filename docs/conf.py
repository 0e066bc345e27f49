"""The documentation as a site: `make docs` builds it with Sphinx into build/docs."""

import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS / "extensions")]

project = "EuroSAT"
author = "The EuroSAT platform maintainers"
release = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
extensions += ["command_help", "settings_table"]  # of docs/extensions
exclude_patterns = ["notebooks", "extensions"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4

autodoc_default_options = {"members": True, "undoc-members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # those of other libraries are not written for Sphinx
default_role = "py:obj"

python_display_short_literal_types = True
nitpicky = True
LIBRARIES = ["numpy", "np", "npt", "pandas", "pd", "torch", "lightning", "optuna", "ray", "mlflow"]
LIBRARIES += ["matplotlib", "starlette", "uvicorn", "requests", "onnx", *sys.stdlib_module_names]
nitpick_ignore_regex = [
    # Types of other libraries: their references are on servers that a build does not call.
    ("py:.*", rf"({'|'.join(LIBRARIES)})\..*"),
    # Names that are imported for type checking only are written without their module.
    ("py:(class|exc)", r"\w+"),
    ("py:class", r".*\.T"),  # type variables
    # A name in single backticks is linked if the reference has it, and code otherwise.
    ("py:obj", "(?s).*"),
]

html_theme = "pydata_sphinx_theme"
html_title = f"EuroSAT {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_sidebars = {"index": [], "tutorial": []}  # the pages that have no section
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
    if what in ("attribute", "data", "property") and lines:
        lines[:0] = ["..", ""]  # an empty comment has no colon


def link_as_file(app: Sphinx, page: str, source: list[str]) -> None:
    """Let links to Markdown outside this folder, such as the README, lead to a copy of the file."""
    source[0] = re.sub(r"\]\(((?:\.\./)+[\w./-]+\.md)(?:#[\w-]+)?\)", link_to(page), source[0])


def link_to(page: str) -> Callable[[re.Match[str]], str]:
    folder = (DOCS / page).parent

    def replace(link: re.Match[str]) -> str:
        outside = not (folder / link[1]).resolve().is_relative_to(DOCS)
        return f"](path:{link[1]})" if outside else link[0]

    return replace


def setup(app: Sphinx) -> None:
    app.connect("source-read", link_as_file)
    app.connect("autodoc-process-docstring", keep_colon, priority=400)  # napoleon has 500
