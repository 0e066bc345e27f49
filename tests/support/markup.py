"""Names that try to become markup, and what a page makes of them."""

from html.parser import HTMLParser

from eurosat.runtime.templates import CONTENT_SECURITY_POLICY

HOSTILE_CLASS = "<img src=x onerror=attack()>"
HOSTILE_FILE = "\"'><svg onload=attack()>.png"
"""Names of a class folder and of a file, which a file system accepts."""


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def assert_page_is_inert(page: str) -> None:
    """Assert that nothing in the page runs, and that its policy would forbid it."""
    parser = _Tags()
    parser.feed(page)
    policies = [attributes.get("content") for tag, attributes in parser.tags if tag == "meta"]
    assert CONTENT_SECURITY_POLICY in policies
    for tag, attributes in parser.tags:
        assert tag not in ("script", "svg", "iframe", "object"), attributes
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        sources = (attributes.get("src") or "", attributes.get("href") or "")
        assert not any(source.startswith(("http", "//", "javascript:", "x")) for source in sources)
