"""Check a built site: links, anchors, images, their alternative text, and that nothing comes from the network.

usage: python tools/check_site.py FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """The anchors, links and loaded files of one page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.without_text: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors.update(value for name in ("id", "name") if (value := values.get(name)))
        if tag == "a" and (href := values.get("href")):
            self.links.append(href)
        if (address := values.get(LOADED.get(tag, ""))) and values.get("rel") not in ("canonical", "prev", "next"):
            self.loaded.append(address)
        if tag == "img" and not values.get("alt"):
            self.without_text.append(str(values.get("src")))


def problems(site: Path) -> Iterator[str]:
    """Everything that is wrong with a site, one line each."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html")) if "pages" not in path.relative_to(site).parts}
    for path, page in pages.items():
        name = path.relative_to(site)
        yield from (f"{name}: image without alternative text: {image}" for image in page.without_text)
        yield from (f"{name}: loads {url} from the network" for url in page.loaded if urlsplit(url).netloc)
        for link in (*page.links, *page.loaded):
            address = urlsplit(link)
            if address.scheme or address.netloc or link.startswith("/"):  # "/": of the page for missing pages
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                yield f"{name}: broken link {link}"
            elif address.fragment and target in pages and unquote(address.fragment) not in pages[target].anchors:
                yield f"{name}: missing anchor {link}"
        if "\n::: " in path.read_text(encoding="utf-8"):
            yield f"{name}: an object that mkdocstrings did not find"


def main() -> int:
    """Print what is wrong; the exit status is 1 if anything is."""
    found = list(problems(Path(sys.argv[1]).resolve()))
    print("\n".join(found), file=sys.stderr) if found else None
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
