"""The book as PDF: Sphinx's single page, printed with Chromium."""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

# Size in bytes from which images are stored as JPEG, and their width in pixels (200 per inch), so the PDF stays small.
LARGE_IMAGE, WIDTH = 100_000, 1400
BROWSERS = ("chromium", "google-chrome", "chromium-browser", "chrome")
# Print style: chapters start on a new page, long lines wrap, interactive elements are hidden.
PRINT = """<style>
@page { size: A4; margin: 16mm 15mm; }
html { font-size: 11px; }
span[id^="document-"] + section { break-before: page; }
figure, img, tr, .admonition-title { break-inside: avoid; }
h2, h3, h4 { break-after: avoid; }
pre { white-space: pre-wrap !important; overflow-wrap: anywhere; font-size: 0.8rem !important; }
div.cell_output .output, div.math, .pst-scrollable-table-container { overflow: visible !important; }
summary, a.headerlink, .copybtn, .bd-header-article, .prev-next-footer { display: none !important; }
</style>"""
FOLDED = re.compile(r"<details.*?</details>", re.DOTALL)


def find_browser() -> str:
    """Path of Chromium or Chrome; exits if there is none."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit("make pdf needs Chromium or Chrome. Install one (Debian: apt-get install chromium).")
    return browser


def write_pdf(source: Path, path: Path, browser: str) -> None:
    """Prints the pages and executed notebooks in `source`, without the API reference, to `path`."""
    toc = source / "book" / "_toc_pdf.yml"
    lines = (source / "book" / "_toc.yml").read_text(encoding="utf-8").splitlines()
    toc.write_text("\n".join(line for line in lines if "book/api" not in line and line.strip() != "sections:"))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [str(Path(sys.executable).with_name("jupyter-book")), "build", str(source), "--all", "-q"]
        command += ["--path-output", folder, "--config", str(source / "_config.yml"), "--toc", str(toc)]
        if subprocess.run([*command, "--builder", "singlehtml"]).returncode != 0:
            sys.exit("the single page of the book does not build, see above")
        site = Path(folder) / "_build" / "singlehtml"
        # In the folder of _static and _images, as its links expect.
        page, html = site / "book.html", (site / "book" / "index.html").read_text(encoding="utf-8")
        for image in (site / "_images").glob("*.png"):
            if image.stat().st_size > LARGE_IMAGE:
                small = Image.open(image).convert("RGB")
                small.thumbnail((WIDTH, 2 * WIDTH))
                small.save(image.with_suffix(".jpg"), quality=80)
                html = html.replace(image.name, image.with_suffix(".jpg").name)
        page.write_text(printable(html), encoding="utf-8")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
        command += ["--no-pdf-header-footer", "--disable-pdf-tagging", "--virtual-time-budget=60000"]
        draft = Path(folder) / "book.pdf"
        done = subprocess.run([*command, f"--print-to-pdf={draft}", page.as_uri()], capture_output=True, text=True)
        if done.returncode != 0 or not draft.exists():
            sys.exit(f"{browser} could not print the book: {done.stderr.strip()[-300:]}")
        draft.replace(path)


def printable(html: str) -> str:
    """The single page with unfolded cells, without the set-up cells. Its theme prints a table of contents."""
    html = FOLDED.sub(lambda cell: "" if "colab_setup.py" in cell[0] else cell[0], html)
    return html.replace("<details", "<details open").replace("</head>", f"{PRINT}</head>", 1)
