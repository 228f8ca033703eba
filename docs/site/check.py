"""Whether every relative link and anchor of a built site leads somewhere; no network.

python docs/site/check.py build/site
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script", "img", "link", "source", "iframe", "video", "audio"}


class Page(HTMLParser):
    """Links, what is loaded, and anchors of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Takes note of a tag's attributes."""
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.anchors.add(given["id"])
        if tag == "a" and "name" in given:
            self.anchors.add(given["name"])
        kind = self.links
        if tag in LOADED and given.get("rel") not in ("canonical", "prev", "next"):
            kind = self.loaded
        kind.extend(given[name] for name in ("href", "src") if name in given)


def broken(site: Path) -> list[str]:
    """What is wrong: links to no file or no anchor, and what a page loads from elsewhere."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    found = []
    for path, page in sorted(pages.items()):
        name = path.relative_to(site)
        outside = [link for link in page.loaded if urlsplit(link).netloc]
        found += [f"{name} loads {link}" for link in outside]
        for link in {*page.links, *page.loaded}:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            there = path
            if parts.path:
                base = site if parts.path.startswith("/") else path.parent
                there = (base / unquote(parts.path).lstrip("/")).resolve()
            if there.is_dir():
                there = there / "index.html"
            if not there.is_file():
                found.append(f"{name} links to {link}, which is not there")
            elif parts.fragment and there.suffix == ".html" and name.name != "404.html":
                anchors = pages[there].anchors
                if unquote(parts.fragment) not in anchors | {"__skip"}:
                    found.append(f"{name} links to {link}, which has no such anchor")
    return found


def main() -> int:
    """Checks the folder that is named."""
    site = Path(sys.argv[1]).resolve()
    pages = len(list(site.rglob("*.html")))
    if not pages:
        print(f"{site} holds no pages: build it first (make docs)", file=sys.stderr)
        return 1
    found = broken(site)
    print("\n".join([*found, f"{pages} pages, {len(found)} links that lead nowhere"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
