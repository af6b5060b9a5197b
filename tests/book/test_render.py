"""The book rendered with stand-ins for the notebooks' figures: no warning, no dead link, no formula or script from elsewhere.

`make book` renders it with the notebooks run; that takes minutes.
"""

import ast
import base64
import io
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from check import problems
from common import ROOT
from nbformat.v4 import new_output
from PIL import Image

from stego_book import build


def with_stand_ins(notebook: Path) -> nbformat.NotebookNode:
    """The notebook with outputs larger than any screen: a gray image for each numbered figure, a table for each `DataFrame`."""
    png = io.BytesIO()
    Image.new("RGB", (1600, 1800), "gray").save(png, "PNG")
    table = pd.DataFrame([[f"value {number}" for number in range(30)]]).to_html()
    found = nbformat.read(notebook, 4)
    for cell in found.cells:
        if cell.metadata.get("mystnb", {}).get("figure"):
            cell.outputs = [new_output("display_data", {"image/png": base64.b64encode(png.getvalue()).decode()})]
        elif cell.cell_type == "code" and re.search(r"DataFrame|table\(", cell.source):
            cell.outputs = [new_output("execute_result", {"text/html": table}, execution_count=1)]
    return found


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> Path:
    """Folder of the rendered pages."""
    folder = tmp_path_factory.mktemp("book")
    names = build.notebooks(ROOT / "book" / "_toc.yml")
    with pytest.MonkeyPatch.context() as patch:
        for name, path in {"BUILD": "_build", "SOURCE": "_build/source", "HTML": "_build/html"}.items():
            patch.setattr(build, name, folder / path)
        for name in names:
            path = build.SOURCE / f"{name}.ipynb"
            path.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(with_stand_ins(ROOT / f"{name}.ipynb"), path)
        for number in (1, 2, 3):
            sample = build.SOURCE / "book" / "_static" / "try" / f"sample-{number}.jpg"
            sample.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(sample)
            (sample.parent / "page.js").touch()
        build.put_together(names, True)
        build.render()  # ends the test where there is a warning
        assert problems(build.HTML, [build.SOURCE / f"{name}.ipynb" for name in names]) == []
        return build.HTML


def test_every_page_is_rendered(html):
    for page in build.pages(ROOT / "book" / "_toc.yml"):
        assert (html / f"{page}.html").exists(), page


def test_the_reference_documents_every_public_name_on_pages_of_bounded_length(html):
    text = {page.stem: page.read_text() for page in (html / "book" / "api").glob("*.html")}
    ids = {name for page in text.values() for name in re.findall(r'id="(stego_lib[\w.]+)"', page)}
    for path in (ROOT / "stego_lib").rglob("*.py"):
        if path.stem.startswith("__"):
            continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_" and ast.get_docstring(node):
                assert f"{module}.{node.name}" in ids
    for name, page in text.items():
        assert len(re.sub(r"<[^>]*>", "", page)) < 60_000, name


def test_reading_needs_no_network(html):
    """No page loads a script, a style or an image from elsewhere."""
    loaded = re.compile(r"""<(?:script|img|link(?=[^>]*stylesheet))[^>]*(?:src|href)=["'](?:https?:)?//[^"']*""")
    for page in [html / "index.html", *(html / "book").glob("*.html"), *(html / "notebooks").glob("*.html")]:
        assert not loaded.findall(page.read_text()), page


def test_formulas_are_drawn_from_the_books_own_files(html, browser):
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get((html / "notebooks" / "loss.html").as_uri())
    count = "return document.querySelectorAll(arguments[0]).length"
    formulas = browser.execute_script(count, ".math")
    WebDriverWait(browser, 60).until(lambda page: page.execute_script(count, "mjx-container") == formulas)
    assert formulas > 20
    scripts = browser.execute_script("return [...document.scripts].map(script => script.src).filter(Boolean)")
    assert [name for name in scripts if "/mathjax/" in name] and all(name.startswith("file:") for name in scripts)


CUT_OFF = """
const width = document.documentElement.clientWidth, found = [];
if (document.documentElement.scrollWidth > width) found.push(`the page is ${document.documentElement.scrollWidth} wide`);
function parents(node) { return node.tagName == "BODY" ? [] : [node, ...parents(node.parentElement)]; }
for (const node of document.querySelectorAll("article :is(table, img, pre, svg, mjx-container)")) {
    const box = node.getBoundingClientRect(), styles = parents(node).map(one => [one, getComputedStyle(one).overflowX]);
    const scrolls = styles.some(([_, overflow]) => ["auto", "scroll"].includes(overflow));
    const hidden = !node.matches("mjx-container") && styles.some(([one, overflow]) => overflow == "hidden" && one.scrollWidth > one.clientWidth + 1);
    const name = `${node.tagName} ${(node.src || node.innerText || "").slice(-40)}`;
    if (box.width && (hidden || (box.right > width + 1 && !scrolls))) found.push(`cut off: ${name}`);
    if (node.tagName == "IMG" && box.height > innerHeight) found.push(`higher than the screen: ${name}`);
    if (node.tagName == "IMG" && !node.alt) found.push(`no alternative text: ${name}`);
}
return found;
"""


@pytest.mark.parametrize(("width", "height"), [(1366, 768), (390, 844)], ids=["laptop", "phone"])
def test_nothing_is_cut_off_on_a_laptop_or_a_phone(html, browser, width, height):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
    )
    tables = 0
    for page in [html / "index.html", *(html / "book").glob("*.html"), *(html / "notebooks").glob("*.html")]:
        browser.get(page.as_uri())
        assert browser.execute_script(CUT_OFF) == [], page.stem
        tables += browser.execute_script("return document.querySelectorAll('article table.dataframe').length")
    assert tables > 10, "the stand-ins stand in the pages"
