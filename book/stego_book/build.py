"""Makes the book: runs its notebooks, renders it, and checks what was rendered.

    python book/stego_book/build.py            # all of it: book/_build/html
    python book/stego_book/build.py --no-run   # renders the notebooks as they were last run
    python book/stego_book/build.py --data FOLDER   # with the street images of FOLDER/camvid; without, with those of data/camvid or scenes

The pages are put together in book/_build/source at the paths that they have in the checkout, an executed copy in place of
each notebook; so a link between two pages is right here, there, and on the page of a repository.
"""

import argparse
import base64
import io
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import yaml
from PIL import Image

from stego_book.notebooks import main as run_notebook
from stego_book.notebooks import parameters_of
from stego_lib.backbone import EMBEDDED_FOR_PHOTOGRAPHS

from . import browser
from .check import problems

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "book" / "_build"
SOURCE = BUILD / "source"
HTML = BUILD / "html"

FIRST = "notebooks/train"
"""Runs before the others, which then find its run."""
TRY = "book/try"
"""The page that segments in the browser."""
PARAMETERS: dict[str, dict[str, Any]] = {
    "notebooks/quickstart": {"backbone": EMBEDDED_FOR_PHOTOGRAPHS, "steps": 100},
    "notebooks/pretrain_scenes": dict(
        steps=40, second_steps=20, images=256, watched=32, save_every=10, folder=os.path.relpath(BUILD / "pretraining")
    ),
    "notebooks/pretrain_photos": dict(
        images="scenes",
        steps="20 5 5",
        batch_size=8,
        watched=20,
        save_every=10,
        folder=os.path.relpath(BUILD / "pretraining_photos"),
    ),
}
"""Notebooks that the book runs otherwise than by their defaults: the whole pre-training takes an hour and a half, and photographs; DINO's
weights need a network."""
BACKBONE = {"backbone": EMBEDDED_FOR_PHOTOGRAPHS}
SHOW_CAMVID = {"stego_from_scratch": {}} | dict.fromkeys(
    ("train", "correspondence", "loss", "data", "evaluation", "choosing"), BACKBONE
)
"""Chapters that show CamVid where it is at hand; the others read records, or work on images of their own. The backbone is the
embedded one, so that a build is the same with and without a network."""
PAGES = (
    "_config.yml",
    "CHANGELOG.md",
    "CITATION.cff",
    "book/*.md",
    "book/api/*.md",
    "book/*.bib",
    "book/_toc.yml",
    "book/_static/*",
)
"""What is copied beside the notebooks."""


def pages(toc: Path) -> list[str]:
    """Every file that the table of contents names, in its order, as written there (without a suffix)."""

    def named(node: Any) -> list[str]:
        if isinstance(node, list):
            return [name for item in node for name in named(item)]
        if isinstance(node, dict):
            own = [node[key] for key in ("root", "file") if key in node]
            return own + [name for key, value in node.items() if isinstance(value, list) for name in named(value)]
        return []

    return named(yaml.safe_load(toc.read_text(encoding="utf-8")))


def notebooks(toc: Path) -> list[str]:
    """The notebooks among them, `FIRST` before the others."""
    found = [name for name in pages(toc) if name.startswith("notebooks/")]
    return sorted(found, key=lambda name: name != FIRST)


def images(data: str | None) -> dict[str, dict[str, Any]]:
    """Parameters of the chapters that can show street images: CamVid in `data`, or in data/; none where it is not there.

    Ends the program where `data` is given and has no CamVid.
    """
    root = Path(data).expanduser().resolve() if data else ROOT / "data"
    if not any((root / name / "train").is_dir() for name in ("camvid", "CamVid")):
        if data:
            sys.exit(
                f"{root} holds no camvid/train; fetch it with: python -m stego_lib.datasets prepare camvid --root {root}"
            )
        print("no CamVid in data/: the chapters show synthetic scenes (street images: make book DATA=FOLDER)")
        return {}
    print(f"the chapters show the street images of CamVid in {root}")
    camvid = {"dataset": "camvid", "data_root": str(root)}
    found = {f"notebooks/{name}": camvid | more for name, more in SHOW_CAMVID.items()}
    return found | {"notebooks/benchmark": {"camvid_root": str(root)}}


def run_all(names: list[str], changes: dict[str, str], own: dict[str, dict[str, Any]] | None = None) -> None:
    """Runs each notebook whose executed copy is older than the notebook, the library, the run records or the benchmarks' results.

    changes: values of parameters as text, given to each notebook that has a parameter of that name. own: further parameters of
    single notebooks, from `images`.
    """
    used = [
        path
        for folder in ("stego_lib", "book/records", "benchmarks/results")
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    ]
    newest = max(path.stat().st_mtime for path in used if "__pycache__" not in path.parts)
    for name in names:
        notebook, executed = ROOT / f"{name}.ipynb", SOURCE / f"{name}.ipynb"
        known = parameters_of(notebook)
        parameters = (
            PARAMETERS.get(name, {})
            | (own or {}).get(name, {})
            | {key: known[key].parse(text) for key, text in changes.items() if key in known}
        )
        if fresh(executed, max(newest, notebook.stat().st_mtime), parameters):
            print(f"{name}: run before, nothing has changed")
            continue
        print(f"{name}: running ...", flush=True)
        started = time.monotonic()
        draft = BUILD / "running" / notebook.name  # a notebook that stopped halfway must not be taken for a chapter
        arguments = [str(item) for pair in parameters.items() for item in ("-p", *pair)]
        if run_notebook([str(notebook), str(draft), *arguments]) != 0:
            sys.exit(f"{name} failed; the notebook up to the error: {draft}")
        executed.parent.mkdir(parents=True, exist_ok=True)
        draft.replace(executed)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


def fresh(executed: Path, newest: float, parameters: dict[str, Any]) -> bool:
    """Whether a notebook was executed with these parameters after the time `newest`."""
    if not executed.exists() or executed.stat().st_mtime <= newest:
        return False
    return nbformat.read(executed, 4).metadata.papermill.parameters == parameters


def put_together(names: list[str], tryable: bool) -> None:
    """Copies the pages beside the executed notebooks, and the notebooks' named figures to book/figures, for pages to show.

    tryable: whether the files of the page "Try it" are there; without them the page is left out.
    """
    for pattern in PAGES:
        for path in ROOT.glob(pattern):
            if path.is_dir():
                continue
            target = SOURCE / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    for name in names:
        for figure, png in named_figures(SOURCE / f"{name}.ipynb").items():
            target = SOURCE / "book" / "figures" / f"{figure}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(png)
    if not tryable:
        toc = (SOURCE / "book" / "_toc.yml").read_text(encoding="utf-8")
        (SOURCE / "book" / "_toc.yml").write_text(re.sub(rf"\n *- file: {TRY}\n", "\n", toc), encoding="utf-8")
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    (SOURCE / "_config.yml").write_text(yaml.safe_dump(with_repository(config, remote())), encoding="utf-8")


def browser_files() -> bool:
    """Writes what the page "Try it" loads; without npm it says why the page is left out, and returns False."""
    shutil.rmtree(SOURCE / "book" / "_static" / "try", ignore_errors=True)
    npm = BUILD / "npm"
    if why := browser.fetch_runtime(npm):
        print(f"the page that segments in the browser is left out: {why}")
        return False
    browser.write_files(browser.demonstration(), npm, SOURCE / "book" / "_static" / "try")
    return True


def named_figures(notebook: Path) -> dict[str, bytes]:
    """Name of each numbered figure of an executed notebook -> its PNG."""
    found = {}
    for cell in nbformat.read(notebook, 4).cells:
        name = cell.metadata.get("mystnb", {}).get("figure", {}).get("name")
        images = [o.data["image/png"] for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
        if name and images:
            found[name] = base64.b64decode(images[0])
    return found


def write_front() -> None:
    """Writes the figures of README.md, as WebP, from executed notebooks that show scenes, whose images may be committed."""
    figures = {"segments": ("train", "fig-predictions"), "backbones": ("benchmark", "fig-backbones")}
    for file, (notebook, figure) in (figures | {"photographs": ("segment_your_images", "fig-overlays")}).items():
        executed = SOURCE / "notebooks" / f"{notebook}.ipynb"
        if nbformat.read(executed, 4).metadata.papermill.parameters.get("dataset") == "camvid":
            sys.exit("the figures of README.md are made of scenes: build the book without CamVid first")
        image = Image.open(io.BytesIO(named_figures(executed)[figure])).convert("RGB")
        image.save(ROOT / "book" / "_static" / f"{file}.webp", quality=85, method=6)


def remote() -> str | None:
    """The repository's address on GitHub, as the checkout knows it, or None."""
    done = subprocess.run(["git", "remote", "get-url", "origin"], cwd=ROOT, capture_output=True, text=True)
    found = re.fullmatch(r"(?:https://|git@)github\.com[/:](.+?)(?:\.git)?/?", done.stdout.strip())
    return f"https://github.com/{found[1]}" if found else None


def with_repository(config: dict[str, Any], url: str | None) -> dict[str, Any]:
    """The configuration with buttons that open a page's notebook on Binder and Colab; without an address, without buttons."""
    if url is None:
        return config
    return config | {
        "repository": {"url": url, "branch": "main"},
        "launch_buttons": {"binderhub_url": "https://mybinder.org", "colab_url": "https://colab.research.google.com"},
        "html": config["html"] | {"use_repository_button": True},
    }


def render() -> None:
    """jupyter-book; a warning is an error, and all of them are told."""
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    command = [str(jupyter_book), "build", str(SOURCE), "--path-output", str(BUILD.parent)]
    command += ["--config", str(SOURCE / "_config.yml"), "--toc", str(SOURCE / "book" / "_toc.yml")]
    shutil.rmtree(HTML, ignore_errors=True)
    if subprocess.run([*command, "--all", "-W", "--keep-going", "-q"]).returncode != 0:
        sys.exit("the book does not build without warnings (they stand above)")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Runs the notebooks of the book and renders it.")
    parser.add_argument("--no-run", action="store_true", help="render the notebooks as they were last run")
    parser.add_argument(
        "--front", action="store_true", help="write the figures of README.md from the executed chapters, and stop"
    )
    parser.add_argument("--data", metavar="FOLDER", help="holds camvid/; without it data/camvid is shown, or scenes")
    parser.add_argument(
        "-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
        help="given to every notebook that has a parameter of this name (to try the build: -p steps 20)",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    toc = ROOT / "book" / "_toc.yml"
    names = notebooks(toc)
    if given.front:
        return write_front()
    if not given.no_run:
        run_all(names, dict(given.parameter), images(given.data))
    put_together(names, browser_files())
    render()
    found = problems(HTML, [SOURCE / f"{name}.ipynb" for name in names])
    if found:
        sys.exit("\n".join(["the book has faults:", *found]))
    print(f"the book: {HTML / 'index.html'} (make serve shows it)")


if __name__ == "__main__":
    main()
