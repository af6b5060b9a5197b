"""The page on architecture names every file, and imports go one way through its table."""

import ast
import re
from pathlib import Path

import pytest
from common import ROOT

import stego_lib

PACKAGE = ROOT / "stego_lib"
PAGE = (ROOT / "book" / "architecture.md").read_text()


def rows() -> list[list[str]]:
    """Files of each row of the table, as `name` or `datasets`."""
    table = PAGE[: PAGE.index("## The way the data takes")]
    return [
        re.findall(r"`(\w+)(?:\.py|/)`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")
    ]


def imported(path: Path) -> set[str]:
    """What a module, or any module of a folder of modules, imports of the package's own rows, wherever in the file."""
    files, level = ([path], 1) if path.suffix else (list(path.glob("*.py")), 2)
    found = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.ImportFrom) and node.level == level:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found


IMPORTS = {path.stem: imported(path) for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
IMPORTS |= {path.parent.name: imported(path.parent) for path in PACKAGE.glob("*/__init__.py")}


def test_the_table_has_every_file_once():
    listed = [name for row in rows() for name in row]
    assert sorted(listed) == sorted(IMPORTS)


def test_imports_go_up_the_table():
    place = {name: number for number, row in enumerate(rows()) for name in row}
    wrong = [
        f"{name} imports {other}" for name, others in IMPORTS.items() for other in others if place[other] > place[name]
    ]
    assert not wrong


def test_no_imports_in_a_circle():
    left = dict(IMPORTS)
    while leaves := [name for name, others in left.items() if not others & set(left)]:
        for name in leaves:
            del left[name]
    assert not left, f"these import each other: {sorted(left)}"


def test_what_is_public_is_there_and_found_by_completion():
    """Names are imported when they are asked for, so Python does not see them by itself."""
    assert set(stego_lib.__all__) <= set(dir(stego_lib))
    assert all(getattr(stego_lib, name) is not None for name in stego_lib.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        stego_lib.trian  # noqa: B018
