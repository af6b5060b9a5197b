"""Checks a rendered book: dead links, missing or undescribed images, tables shown as text, errors in outputs."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat

# A Markdown table that was rendered as text.
RAW_TABLE = re.compile(r"\|(\s*[:—–-]+\s*\|){2}")
# Tag -> the attribute with the file that it loads.
LOADING = {"script": "src", "img": "src", "link": "href"}


class Page(HTMLParser):
    """Links, link targets and errors of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.targets: set[str] = set()
        self.links: list[str] = []
        self.faults: list[str] = []
        self._open = {"article": 0, "pre": 0, "code": 0}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        if tag in self._open:
            self._open[tag] += 1
        self.targets |= {values[key] for key in ("id", "name") if key in values}
        self.links += [values[key] for key in ("href", "src") if key in values]
        source = values.get(LOADING.get(tag, ""), "")
        if urlsplit(source).netloc and (tag != "link" or values.get("rel") == "stylesheet"):
            self.faults.append(f"needs the network: {source}")
        alt = values.get("alt", "").strip()  # Sphinx fills in the file's name
        if tag == "img" and self._open["article"] and (len(alt) <= 10 or Path(alt).name == Path(source).name):
            self.faults.append(f"image without an alternative text: {source[:60]}")

    def handle_data(self, data: str) -> None:
        if self._open["article"] and not self._open["pre"] + self._open["code"] and RAW_TABLE.search(data):
            self.faults.append(f"table not rendered: {data.strip()[:60]}")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            self._open[tag] -= 1


def problems(html: Path, notebooks: list[Path]) -> list[str]:
    """One line per error in the book rendered to `html` from the executed `notebooks`."""
    faults = [f"{path}: {line}" for path in notebooks for line in errors(path)]
    pages = {path.resolve(): Page(path) for path in sorted(html.rglob("*.html")) if "_static" not in path.parts}
    for page in pages.values():
        dead = [f"dead link: {link}" for link in dead_links(page, pages)]
        faults += [f"{page.path.relative_to(html)}: {line}" for line in dead + page.faults]
    return faults


def errors(notebook: Path) -> Iterator[str]:
    """Errors in a notebook's outputs, and missing numbered figures."""
    for number, cell in enumerate(nbformat.read(notebook, 4).cells):
        outputs = cell.get("outputs", [])
        for output in outputs:
            if output.output_type == "error" or "Traceback (most recent call last)" in output.get("text", ""):
                yield f"cell {number} holds an error: {output.get('ename', 'a traceback')}"
        figure = cell.metadata.get("mystnb", {}).get("figure", {}).get("name")
        if figure and not any("image/png" in output.get("data", {}) for output in outputs):
            yield f"cell {number} should show figure {figure}"


def dead_links(page: Page, pages: dict[Path, Page]) -> Iterator[str]:
    """Links of a page to files and anchors of the book that do not exist."""
    for link in page.links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path.resolve()
        if target.is_dir():
            target = target / "index.html"
        anchor = unquote(parts.fragment)
        if not target.exists() or (anchor and target in pages and anchor not in pages[target].targets):
            yield link
