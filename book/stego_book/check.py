"""Looks a rendered book over: dead internal links, missing or undescribed images, unrendered tables, errors among the outputs."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat


class Page(HTMLParser):
    """What one page refers to, and what it can be referred to by."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.targets: set[str] = set()
        """The ids of the page."""
        self.references: list[str] = []
        """Every href and src."""
        self.undescribed: list[str] = []
        """Images of the article without an alternative text."""
        self.unrendered: list[str] = []
        """Tables that stand in the article as they were typed."""
        self._inside = {"article": 0, "pre": 0, "code": 0}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in self._inside:
            self._inside[tag] += 1
        self.targets |= {values[key] for key in ("id", "name") if values.get(key)}
        self.references += [values[key] for key in ("href", "src") if values.get(key)]
        if tag == "img" and self._inside["article"] and not described(values.get("alt"), values.get("src") or ""):
            self.undescribed.append((values.get("src") or "?")[:60])

    def handle_data(self, data: str) -> None:
        if (
            self._inside["article"]
            and not self._inside["pre"] + self._inside["code"]
            and re.search(r"\|(\s*[:—–-]+\s*\|){2}", data)
        ):
            self.unrendered.append(data.strip()[:60])

    def handle_endtag(self, tag: str) -> None:
        if tag in self._inside:
            self._inside[tag] -= 1


def described(alt: str | None, source: str) -> bool:
    """Whether `alt` tells more than the file's own name, which Sphinx puts there when nobody wrote anything."""
    return bool(alt and alt.strip() and Path(alt).name != Path(source).name and len(alt.strip()) > 10)


def problems(html: Path, notebooks: list[Path]) -> list[str]:
    """One line for each fault of the book rendered in `html` from the executed `notebooks`; none if all is well."""
    found = [f"{path}: {line}" for path in notebooks for line in errors(path)]
    read = {path.resolve(): Page(path) for path in sorted(html.rglob("*.html")) if "_static" not in path.parts}
    for page in read.values():
        where = page.path.relative_to(html)
        found += [f"{where}: leads nowhere: {reference}" for reference in dead_references(page, read)]
        found += [f"{where}: an image without an alternative text: {source}" for source in page.undescribed]
        found += [f"{where}: a table that was not rendered: {text}" for text in page.unrendered]
    return found


def errors(notebook: Path) -> Iterator[str]:
    """The errors among a notebook's outputs, and the cells that should have drawn a numbered figure and did not."""
    for number, cell in enumerate(nbformat.read(notebook, 4).cells):
        outputs = cell.get("outputs", [])
        for output in outputs:
            if output.output_type == "error" or "Traceback (most recent call last)" in output.get("text", ""):
                yield f"cell {number} holds an error: {output.get('ename', 'a traceback')}"
        figure = cell.metadata.get("mystnb", {}).get("figure", {}).get("name")
        if figure and not any("image/png" in output.get("data", {}) for output in outputs):
            yield f"cell {number} should show figure {figure} and shows none"


def dead_references(page: Page, read: dict[Path, Page]) -> Iterator[str]:
    """References of a page to files and places of the book that are not there. Other sites are not asked."""
    for reference in page.references:
        parts = urlsplit(reference)
        if parts.scheme or parts.netloc:
            continue
        target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path.resolve()
        if target.is_dir():
            target = target / "index.html"
        anchor = unquote(parts.fragment)
        if not target.exists() or (anchor and target in read and anchor not in read[target].targets):
            yield reference
