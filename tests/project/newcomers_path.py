"""Measures the library as a newcomer reads it: the files that one image passes from file to score, and import closures.

`python tests/project/newcomers_path.py` prints the tables of the architecture page; `--write` puts them into it.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "stego_lib"
PAGE = ROOT / "book" / "architecture.md"
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"
STEPS = {
    "datasets/images": "an image file becomes RGB",
    "datasets/base": "image and label map become tensors",
    "datasets/transforms": "they are resized",
    "backbone": "the frozen network extracts features",
    "features/source": "features of one row",
    "features/store": "features are read from disk",
    "neighbors": "each image finds its neighbors",
    "batches": "images, partners and points of one step",
    "model": "features become codes",
    "loss": "the correspondence loss",
    "training": "the loop",
    "probes": "clusters are fitted, and every pixel is predicted",
    "metrics": "confusion matrix, Hungarian matching, mIoU",
    "evaluation": "scores and the run record",
}
"""Files that the image passes, in order. What they call besides is machinery (`runtime`), or chooses and reports: experiment,
calibration, watch, baselines, CRF."""


def imported(path: Path) -> set[Path]:
    """Files of the package that `path` imports, wherever in it."""
    found, package = set(), path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
            for name in (None, *(alias.name for alias in node.names)):
                place = PACKAGE.joinpath(*base, *([name] if name else []))
                found |= {file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()}
    return found - {path, PACKAGE / "__init__.py"}


def closure(name: str) -> set[Path]:
    """The file of that name in the root and all that it imports, directly or not."""
    seen: set[Path] = set()
    todo = [PACKAGE / f"{name}.py"]
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo += imported(path)
    return seen


def lines(path: Path) -> int:
    """Lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def code_lines(path: Path) -> int:
    """Lines of a file without blank lines, comments and docstrings."""
    text = path.read_text(encoding="utf-8")
    documented = {
        number
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for number in range(node.lineno, node.end_lineno + 1)
    }
    return sum(
        number not in documented and bool(line.strip()) and not line.strip().startswith("#")
        for number, line in enumerate(text.splitlines(), 1)
    )


def path_files() -> list[Path]:
    """The files of `STEPS`."""
    return [PACKAGE / f"{name}.py" for name in STEPS]


def tables() -> str:
    """The tables of the architecture page, in Markdown."""
    files = path_files()
    rows = [
        f"| `{name}.py` | {text} | {lines(file)} | {code_lines(file)} |"
        for (name, text), file in zip(STEPS.items(), files, strict=True)
    ]
    total = f"| {len(files)} files | | {sum(map(lines, files))} | {sum(map(code_lines, files))} |"
    head = ["| file | what happens to the image | lines | of them code |", "|---|---|---|---|"]
    found = ["", *head, *rows, total, "", "| import of | loads files | lines, about |", "|---|---|---|"]
    for name in ("loss", "model", "backbone", "training", "evaluation"):
        reached = closure(name)
        found.append(f"| `stego_lib.{name}` | {len(reached)} | {round(sum(map(lines, reached)), -2):,} |")
    return "\n".join([*found, ""])


def main() -> None:
    """The command line."""
    if "--write" in sys.argv:
        text = PAGE.read_text(encoding="utf-8")
        before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
        PAGE.write_text(f"{before}\n{tables()}\n{after}", encoding="utf-8")
    print(tables())


if __name__ == "__main__":
    main()
