"""Builds the book: runs its notebooks, renders the pages, and checks them.

    python -m stego_book.build                  # book/_build/html
    python -m stego_book.build --no-run         # renders the last executed notebooks
    python -m stego_book.build --data FOLDER    # shows the street images of FOLDER/camvid
    python -m stego_book.build --pdf            # also as one PDF

The pages and executed notebooks are copied to book/_build/source with the paths of the checkout, so that links between
pages work in both places.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
import yaml
from PIL import Image

from stego_lib.backbone import EMBEDDED_FOR_PHOTOGRAPHS

from . import browser
from .check import problems
from .notebooks import parameters_of
from .pdf import find_browser, write_pdf
from .reference import write_reference

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "book" / "_build"
SOURCE = BUILD / "source"
HTML = BUILD / "html"
PDF = SOURCE / "book" / "stego.pdf"

# Run first, one after the other; other notebooks reuse their runs.
FIRST = ("notebooks/train", "notebooks/quickstart", "notebooks/segment_your_images")
# Number of cores, and of notebooks that run at the same time.
CORES = os.cpu_count() or 1
WORKERS = min(CORES, 4)
# The page that segments images in the browser.
TRY = "book/try"
# Parameters of notebooks that `-p` does not change: their defaults take long, need network access, or are those of the
# records that they read.
PARAMETERS: dict[str, dict[str, Any]] = {
    "notebooks/ablations": {},
    "notebooks/baselines": {},
    "notebooks/quickstart": {"backbone": EMBEDDED_FOR_PHOTOGRAPHS, "steps": 100},
    "notebooks/pretrain_scenes": dict(
        steps=40, second_steps=20, images=256, watched=32, save_every=10, folder=os.path.relpath(BUILD / "pretraining")
    ),
    "notebooks/pretrain_photos": dict(
        images="scenes", steps="20 5 5", batch_size=8, watched=20, folder=os.path.relpath(BUILD / "pretraining_photos")
    ),
}
# Chapters that show CamVid if available, with an embedded backbone, so that a build needs no network access.
SHOW_CAMVID = ("train", "correspondence", "loss", "data", "evaluation", "resolution", "choosing", "stego_from_scratch")
# Files copied to the build folder with the notebooks.
PAGES = ("CHANGELOG.md", "CITATION.cff", "book/*.md", "book/*.bib", "book/_toc.yml", "book/_static/*")


def pages(toc: Path) -> list[str]:
    """All files in the table of contents, in order, without suffix."""
    return re.findall(r"^ *(?:- )?(?:root|file): (\S+)$", toc.read_text(encoding="utf-8"), re.MULTILINE)


def notebooks(toc: Path) -> list[str]:
    """The notebooks in the table of contents, `FIRST` first."""
    names = [name for name in pages(toc) if name.startswith("notebooks/")]
    return [*FIRST, *(name for name in names if name not in FIRST)]


def camvid_parameters(data: str | None) -> dict[str, dict[str, Any]]:
    """Parameters of the chapters that show street images if `data` (default: data/) contains CamVid."""
    root = Path(data).expanduser().resolve() if data else ROOT / "data"
    if not any((root / name / "train").is_dir() for name in ("camvid", "CamVid")):
        if data:
            sys.exit(f"{root} contains no camvid/train. Run: python -m stego_lib.datasets prepare camvid --root {root}")
        print("the chapters show synthetic scenes (for street images: make book DATA=FOLDER)")
        return {}
    camvid = {"dataset": "camvid", "data_root": str(root), "backbone": EMBEDDED_FOR_PHOTOGRAPHS}
    chosen = {f"notebooks/{name}": dict(camvid) for name in SHOW_CAMVID}
    del chosen["notebooks/stego_from_scratch"]["backbone"]  # it has no such parameter
    return chosen | {"notebooks/benchmark": {"camvid_root": str(root)}}


def run_all(names: list[str], changes: dict[str, str], own: dict[str, dict[str, Any]]) -> None:
    """Runs each notebook that is newer than its executed copy, or if the packages, records or benchmarks are newer.

    Those in `FIRST` run alone, the others several at a time.

    changes: parameter name -> text, for all notebooks with this parameter. own: parameters of single notebooks.
    """
    folders = ("stego_lib", "book/stego_book", "book/records", "benchmarks/results")
    used = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix != ".pyc"]
    newest = max(path.stat().st_mtime for path in used if path.is_file())
    outdated: dict[str, dict[str, Any]] = {}
    for name in names:
        notebook = ROOT / f"{name}.ipynb"
        known = parameters_of(notebook)
        given = {
            key: known[key].parse(text) for key, text in changes.items() if key in known and name not in PARAMETERS
        }
        parameters = PARAMETERS.get(name, {}) | own.get(name, {}) | given
        if is_fresh(SOURCE / f"{name}.ipynb", max(newest, notebook.stat().st_mtime), parameters):
            print(f"{name}: up to date")
        else:
            outdated[name] = parameters
    for name in FIRST:
        if name in outdated:
            run_one(name, outdated.pop(name), threads=CORES)
    with ThreadPoolExecutor(WORKERS) as pool:
        running = [pool.submit(run_one, *item, threads=CORES // WORKERS) for item in outdated.items()]
    for future in running:
        future.result()  # raises the error of a notebook, if any


def run_one(name: str, parameters: dict[str, Any], threads: int) -> None:
    """Runs a notebook in a process of its own, which uses `threads` cores."""
    print(f"{name}: running ...\n", end="", flush=True)  # as one text, because several threads print
    started = time.monotonic()
    draft, executed = BUILD / "running" / Path(f"{name}.ipynb").name, SOURCE / f"{name}.ipynb"
    arguments = [str(item) for pair in parameters.items() for item in ("-p", *pair)]
    command = [sys.executable, "-m", "stego_book.notebooks", str(ROOT / f"{name}.ipynb"), str(draft), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{name} failed:\n{done.stdout}{done.stderr}")
    polish(draft)
    executed.parent.mkdir(parents=True, exist_ok=True)
    draft.replace(executed)  # the draft is not in SOURCE, as it may be partly executed
    print(f"{name}: {time.monotonic() - started:.0f} s\n", end="", flush=True)


def polish(executed: Path) -> None:
    """Labels the folded parameters and solutions, and keeps "mean ± deviation" in tables on one line."""
    notebook = nbformat.read(executed, 4)
    exercises = False
    for cell in notebook.cells:
        exercises = exercises or "## Exercises" in cell.source
        tags = cell.metadata.get("tags", [])
        if "parameters" in tags:
            cell.metadata.setdefault("mystnb", {})["code_prompt_show"] = "Show parameters"
        if exercises and "hide-cell" in tags:
            cell.metadata.setdefault("mystnb", {})["code_prompt_show"] = "Show solution"
        for output in cell.get("outputs", []):
            for kind in {"text/html", "text/markdown"} & set(output.get("data", {})):
                output.data[kind] = output.data[kind].replace(" ± ", "\u00a0±\u00a0")
    nbformat.write(notebook, executed)


def is_fresh(executed: Path, newest: float, parameters: dict[str, Any]) -> bool:
    """Whether a notebook was executed with these parameters after the time `newest`."""
    if not executed.exists() or executed.stat().st_mtime <= newest:
        return False
    return nbformat.read(executed, 4).metadata.papermill.parameters == parameters


def put_together(names: list[str], with_browser_page: bool) -> None:
    """Copies the pages to the executed notebooks, and the notebooks' numbered figures to book/figures."""
    for path in (path for pattern in PAGES for path in ROOT.glob(pattern) if path.is_file()):
        target = SOURCE / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    write_reference(SOURCE)
    folder = SOURCE / "book" / "figures"
    folder.mkdir(exist_ok=True)
    for name in names:
        for figure, png in named_figures(SOURCE / f"{name}.ipynb").items():
            (folder / f"{figure}.png").write_bytes(png)
    if not with_browser_page:
        toc = SOURCE / "book" / "_toc.yml"
        toc.write_text(re.sub(rf"\n *- file: {TRY}\n", "\n", toc.read_text(encoding="utf-8")), encoding="utf-8")
    if not PDF.exists():  # the welcome page then has no link to it
        index = SOURCE / "book" / "index.md"
        index.write_text(re.sub(rf".*\({PDF.name}\).*\n", "", index.read_text(encoding="utf-8")), encoding="utf-8")
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    done = subprocess.run(["git", "remote", "get-url", "origin"], cwd=ROOT, capture_output=True, text=True)
    config = with_repository(config, done.stdout.strip())
    (SOURCE / "_config.yml").write_text(yaml.safe_dump(config), encoding="utf-8")


def with_repository(config: dict[str, Any], address: str) -> dict[str, Any]:
    """The configuration with buttons for Binder and Colab if the address is on GitHub."""
    match = re.fullmatch(r"(?:https://|git@)github\.com[/:](.+?)(?:\.git)?/?", address)
    if match is None:
        return config
    return config | {
        "repository": {"url": f"https://github.com/{match[1]}", "branch": "main"},
        "launch_buttons": {"binderhub_url": "https://mybinder.org", "colab_url": "https://colab.research.google.com"},
        "html": config["html"] | {"use_repository_button": True},
    }


def write_browser_files() -> bool:
    """Writes the files of the page "Try it". Returns False without npm; the page is then skipped."""
    shutil.rmtree(SOURCE / "book" / "_static" / "try", ignore_errors=True)
    npm = BUILD / "npm"
    if reason := browser.fetch_runtime(npm):
        print(f"the page Try it is skipped: {reason}")
        return False
    browser.write_files(browser.demonstration(), npm, SOURCE / "book" / "_static" / "try")
    return True


def named_figures(notebook: Path) -> dict[str, bytes]:
    """PNG of each numbered figure of an executed notebook, by name."""
    figures = {}
    for cell in nbformat.read(notebook, 4).cells:
        name = cell.metadata.get("mystnb", {}).get("figure", {}).get("name")
        images = [o.data["image/png"] for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
        if name and images:
            figures[name] = base64.b64decode(images[0])
    return figures


def write_readme_figures() -> None:
    """Writes the figures of README.md from executed notebooks that show scenes, whose images may be committed."""
    sources = {
        "segments": ("train", "fig-predictions"),
        "five_labels": ("five_labels", "fig-five-labels"),
    }
    for file, (notebook, figure) in sources.items():
        executed = SOURCE / "notebooks" / f"{notebook}.ipynb"
        if not executed.exists():
            print(f"{file}.webp stays: notebooks/{notebook}.ipynb was not run")
            continue
        if nbformat.read(executed, 4).metadata.papermill.parameters.get("dataset") == "camvid":
            sys.exit("the figures of README.md show scenes. Build the book without CamVid first.")
        image = Image.open(io.BytesIO(named_figures(executed)[figure])).convert("RGB")
        image.save(ROOT / "book" / "_static" / f"{file}.webp", quality=85, method=6)


def render() -> None:
    """Runs jupyter-book; warnings are errors."""
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", str(SOURCE)]
    command += ["--path-output", str(BUILD.parent), "--config", str(SOURCE / "_config.yml")]
    command += ["--toc", str(SOURCE / "book" / "_toc.yml"), "--all", "-W", "--keep-going", "-q"]
    shutil.rmtree(HTML, ignore_errors=True)
    if subprocess.run(command).returncode != 0:
        sys.exit("the book has build warnings (above). Fix them and build again.")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Runs the notebooks of the book and renders it.")
    parser.add_argument("--no-run", action="store_true", help="render the last executed notebooks")
    parser.add_argument(
        "--front", action="store_true", help="write the figures of README.md from the executed chapters"
    )
    parser.add_argument("--pdf", action="store_true", help="write the book as one PDF too")
    parser.add_argument("--data", metavar="FOLDER", help="show the street images of FOLDER/camvid (default: data/)")
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="set this parameter in all notebooks that have it (short runs: -p steps 20)")  # fmt: skip
    given = parser.parse_args(arguments)
    if given.front:
        return write_readme_figures()
    browser_program = find_browser() if given.pdf else ""  # before the chapters run
    names = notebooks(ROOT / "book" / "_toc.yml")
    if not given.no_run:
        run_all(names, dict(given.parameter), camvid_parameters(given.data))
    PDF.unlink(missing_ok=True)
    with_browser_page = write_browser_files()
    put_together(names, with_browser_page)
    if given.pdf:
        write_pdf(SOURCE, PDF, browser_program)
        put_together(names, with_browser_page)  # again, with the link to it
    render()
    if faults := problems(HTML, [SOURCE / f"{name}.ipynb" for name in names]):
        sys.exit("\n".join(["errors in the rendered book:", *faults]))
    print(f"book: {HTML / 'index.html'} (view it with make serve)")


if __name__ == "__main__":
    main()
