"""Data Docs that need nothing but themselves: no script, style or picture from anyone's server.

Great Expectations' pages load their look and their index from a dozen hosts. Here they get a small
stylesheet of ours instead, so that they read the same on a machine without a network and inside
MLflow's artifact viewer, and opening them tells nobody.
"""

import re
import shutil
from pathlib import Path

from eurosat.errors import ConfigError

MARKER = ".data_docs"
"""Says that a folder holds Data Docs of ours, and may be replaced."""
REMOTE = (
    re.compile(r"<link\b[^>]*>"),  # styles, and the icon of a folder that is not published
    re.compile(r"<img\b[^>]*src=\"https?://[^>]*>"),
    re.compile(r"<script\b.*?</script>", re.DOTALL),  # all drive the libraries taken out here
    re.compile(r"<footer>.*?</footer>", re.DOTALL),  # a newsletter
    re.compile(r"[\w-]+:\s*url\([^)]*https?://[^)]*\)[^;}]*;?"),
)
STYLE = """<style>
body { font: 15px/1.45 system-ui, sans-serif; color: #1d2733; margin: 0 auto;
  max-width: 1180px; padding: 16px; }
a { color: #17609c; } h5 { font-size: 1.1rem; margin: 0; } h6 { font-size: 1rem; margin: 8px 0; }
table { border-collapse: collapse; margin: 6px 0 12px; } thead[hidden] { display: none; }
th, td { border: 1px solid #d5dbe1; padding: 4px 10px; text-align: left; vertical-align: top; }
th { background: #f2f5f8; } .alert { background: #e8eef4; padding: 6px 10px; margin-top: 14px; }
.breadcrumb, .nav { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 4px 14px; }
.navbar { height: auto !important; }
.badge { background: #e8eef4; border-radius: 4px; padding: 0 5px; font-family: monospace; }
.text-danger { color: #b3261e; } .text-success { color: #1b7a3d; }
.text-warning { color: #8a6100; }
i.fas { font-style: normal; font-weight: 700; white-space: nowrap; }
i.fa-check-circle::before { content: "\\2713  passed"; }
i.fa-times::before { content: "\\2717  FAILED"; }
i.fa-exclamation-triangle::before { content: "!  error"; }
.card.mb-3, .modal, button, a[data-toggle="collapse"], .collapse code { display: none; }
</style></head>"""


def check_target(target: Path) -> None:
    """Raise ConfigError unless ``target`` is absent, empty, or holds Data Docs of ours."""
    if target.is_dir() and (not any(target.iterdir()) or (target / MARKER).is_file()):
        return
    if target.exists():
        raise ConfigError(
            f"docs={target} holds something other than Data Docs, which would be lost: name a "
            "folder that is new or empty"
        )


def publish(site: Path, target: Path) -> Path:
    """Put the pages that were built in ``site`` in place of ``target``'s; return the first.

    That is the page of the one validation: Great Expectations' own index is made by its scripts.
    """
    check_target(target)
    (validation,) = site.glob("validations/**/*.html")
    upwards = "../" * (len(validation.relative_to(site).parts) - 1)
    pages = {
        Path("index.html"): validation.read_text("utf-8").replace(upwards, ""),
        **{
            page.relative_to(site): page.read_text("utf-8")
            for page in site.glob("expectations/**/*.html")
        },
    }
    shutil.rmtree(target, ignore_errors=True)
    for path, html in pages.items():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_text(self_contained(html), "utf-8")
    (target / MARKER).write_text("expectations.validate wrote this folder and replaces it\n")
    return target / "index.html"


def self_contained(html: str) -> str:
    for remote in REMOTE:
        html = remote.sub("", html)
    return html.replace("</head>", STYLE, 1)
