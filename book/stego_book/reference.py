"""Writes the pages of the API reference, one per folder of the two packages, from the docstrings."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Without the long signature of `Experiment`.
EXPERIMENT = """   :exclude-members: Experiment

.. autoclass:: stego_lib.experiment.Experiment(**values)
   :members:
"""


def folders() -> list[Path]:
    """The folders with modules, the library's first."""
    packages = (ROOT / "stego_lib", ROOT / "book" / "stego_book")
    return [file.parent for package in packages for file in sorted(package.rglob("__init__.py"))]


def modules(folder: Path) -> list[str]:
    """Full names of the modules directly in a folder."""
    package = ROOT if (ROOT / "stego_lib") in (folder, *folder.parents) else ROOT / "book"
    names = [".".join(path.relative_to(package).with_suffix("").parts) for path in sorted(folder.glob("*.py"))]
    return [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]


def page_name(folder: Path) -> str:
    """File name of a folder's page, without suffix."""
    return modules(folder)[0].replace(".", "-")


def page(folder: Path) -> str:
    """The page of a folder in MyST Markdown: a table of its modules, then their documentation."""
    names = modules(folder)
    table = "\n".join(f"   ~{name}" for name in names)
    parts = [f"# {names[0]}\n\n```{{eval-rst}}\n.. autosummary::\n   :nosignatures:\n\n{table}\n```\n"]
    for name in names:
        members = f".. automodule:: {name}\n   :members:\n   :ignore-module-all:\n"  # re-exports are documented once
        if name == "stego_lib":  # its names are documented in their modules
            members = f".. automodule:: {name}\n"
        members += EXPERIMENT if name == "stego_lib.experiment" else ""
        parts.append(f"## {name}\n\n```{{eval-rst}}\n{members}```\n")
    return "\n".join(parts)


def write_reference(source: Path) -> None:
    """Writes the pages to book/api in `source` and adds them to the table of contents."""
    target = source / "book" / "api"
    target.mkdir(parents=True, exist_ok=True)
    for folder in folders():
        (target / f"{page_name(folder)}.md").write_text(page(folder), encoding="utf-8")
    toc = source / "book" / "_toc.yml"
    entry = "      - file: book/api\n"
    sections = "".join(f"          - file: book/api/{page_name(folder)}\n" for folder in folders())
    text = toc.read_text(encoding="utf-8").replace(entry, f"{entry}        sections:\n{sections}")
    toc.write_text(text, encoding="utf-8")
