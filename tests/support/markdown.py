"""Pages in Markdown: their links, headings and blocks of code."""

import functools
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.support.paths import ROOT

DOCS = ROOT / "docs"
TOCTREE = "{toctree}"


@dataclass(frozen=True)
class CodeBlock:
    language: str
    text: str


def pages() -> list[Path]:
    """Return every page of the repository that people read."""
    return [
        *sorted(ROOT.glob("*.md")),
        *sorted(DOCS.rglob("*.md")),
        *sorted((ROOT / "benchmarks").glob("*.md")),
    ]


@functools.cache
def tokens(page: Path) -> tuple[Token, ...]:
    """Return the tokens of a page, those within its lines too."""
    parsed = MarkdownIt().enable("table").parse(page.read_text())
    return tuple(token for outer in parsed for token in (outer, *(outer.children or ())))


def links(page: Path) -> list[str]:
    """Return the targets of links and images that are not on another host."""
    targets = [
        str(token.attrs.get("href") or token.attrs.get("src"))
        for token in tokens(page)
        if token.type in ("link_open", "image")
    ]
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = [
        following.content
        for token, following in itertools.pairwise(tokens(page))
        if token.type == "heading_open"
    ]
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def blocks(page: Path) -> list[CodeBlock]:
    """Return the fenced blocks of a page, in order."""
    return [
        CodeBlock(token.info.strip(), token.content)
        for token in tokens(page)
        if token.type == "fence"
    ]


def toctree_entries(page: Path) -> list[Path]:
    """Return the pages that the toctrees of a page list."""
    listed: list[Path] = []
    for block in blocks(page):
        if block.language == TOCTREE:
            entries = [line for line in block.text.split("\n") if line and line[0] != ":"]
            folder = page.parent
            for entry in entries:
                listed += [file.resolve() for file in folder.glob(f"{entry}.md")]
    return listed
