"""The code of the project, parsed."""

import ast
import re

import nbformat
from common import ROOT


def sources() -> dict[str, ast.Module]:
    """The code of the project: library, tests, and the notebooks' cells."""
    found = {
        str(path.relative_to(ROOT)): path.read_text()
        for part in ("stego_lib", "tests", "book")
        for path in (ROOT / part).rglob("*.py")
    }
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for i, cell in enumerate(nbformat.read(path, 4).cells):
            if cell.cell_type == "code":
                found[f"{path.name} cell {i}"] = re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.MULTILINE)
    return {name: ast.parse(text) for name, text in found.items()}


def calls(tree: ast.Module) -> list[tuple[str, dict[str, str]]]:
    """Every call: what is called, and its named arguments, as text."""
    return [
        (ast.unparse(node.func), {word.arg or "**": ast.unparse(word.value) for word in node.keywords})
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]
